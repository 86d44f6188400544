//! What answers the procedures: each decodes its arguments, calls one use case, encodes the result.

pub mod backup;
pub mod checkpoints;
mod cold;
pub mod connect;
pub mod console;
pub mod copies;
pub mod cpu;
pub mod define;
pub mod devices;
pub mod domain;
mod encryption;
pub mod event;
mod external;
pub mod figures;
pub mod graphics;
pub mod host;
pub mod inside;
pub mod layers;
pub mod machine;
pub mod memory;
mod memtune;
pub mod monitor;
pub mod network;
pub mod network_update;
pub mod networks;
pub mod nodedev;
pub mod nwfilter;
pub mod plugged;
pub mod pools;
pub mod power;
pub mod secret;
mod sides;
pub mod sizes;
pub mod snapshots;
pub mod stats;
pub mod storage;
pub mod threads;
mod told;
pub mod transfer;
pub mod tuning;
pub mod volumes;

use crate::{
    domain_id, domain_uuid,
    error::{Code, VirError},
    session::{Answer, Call},
    xdr::{Reader, Writer},
};
use karst_engine::InstanceView;
use std::sync::Arc;
use uuid::Uuid;

/// What a handler gives.
pub type Answered = Result<Answer, VirError>;

/// Most names or objects of one answer (`REMOTE_DOMAIN_LIST_MAX` and its like).
pub const LIST_MAX: usize = 16384;

/// A domain, network or pool as clients name it.
pub struct Named {
    /// Name.
    pub name: String,
    /// UUID.
    pub uuid: Uuid,
}

impl Named {
    /// `remote_nonnull_network`, `remote_nonnull_storage_pool`.
    ///
    /// # Errors
    /// RPC.
    pub fn read(r: &mut Reader<'_>) -> Result<Self, VirError> {
        Ok(Self { name: r.string()?, uuid: r.uuid()? })
    }

    /// `remote_nonnull_domain`; its number says nothing that the UUID does not.
    ///
    /// # Errors
    /// RPC.
    pub fn read_domain(r: &mut Reader<'_>) -> Result<Self, VirError> {
        let named = Self::read(r)?;
        r.i32()?;
        Ok(named)
    }
}

/// Writes `remote_nonnull_domain`.
pub fn write_domain(w: &mut Writer, view: &InstanceView) {
    w.string(&view.instance.name).uuid(domain_uuid(view)).i32(domain_id(view));
}

impl Call {
    /// The guest that a client means: by UUID, whatever it is called now.
    ///
    /// # Errors
    /// No domain.
    pub fn guest(&self, named: &Named) -> Result<Arc<InstanceView>, VirError> {
        if let Ok(view) = self.session.guest(&named.name)
            && domain_uuid(&view) == named.uuid
        {
            return Ok(view);
        }
        self.session.guest_by_uuid(named.uuid).map_err(|e| match e.code {
            Code::NoDomain => {
                let text = format!("no domain with matching uuid '{}' ({})", named.uuid, named.name);
                VirError { text, ..e }
            }
            _ => e,
        })
    }

    /// The guest that is the only argument.
    ///
    /// # Errors
    /// RPC, no domain.
    pub fn only_guest(&self) -> Result<Arc<InstanceView>, VirError> {
        self.guest(&self.arguments(Named::read_domain)?)
    }

    /// The guest and flags, the only arguments, where no flag has a meaning.
    ///
    /// # Errors
    /// RPC, no domain; invalid for any flag.
    pub fn guest_without_flags(&self) -> Result<Arc<InstanceView>, VirError> {
        let (named, flags) = self.arguments(|r| Ok((Named::read_domain(r)?, r.u32()?)))?;
        self.known_flags(flags, 0)?;
        self.guest(&named)
    }

    /// Demands that no flag is set beside `known`.
    ///
    /// # Errors
    /// Invalid, with the flags in question.
    pub fn known_flags(&self, flags: u32, known: u32) -> Result<(), VirError> {
        match flags & !known {
            0 => Ok(()),
            more => {
                let name = crate::table::name_of(self.header.program, self.header.procedure);
                Err(VirError::argument(format!("unsupported flags (0x{more:x}) in function {name}")))
            }
        }
    }
}

/// An `int` as the whole answer.
pub fn int(v: i32) -> Answer {
    let mut w = Writer::new();
    w.i32(v);
    w.finish().into()
}

/// A flag as the whole answer.
pub fn flag(v: bool) -> Answer {
    int(i32::from(v))
}

/// A string as the whole answer.
pub fn text(v: &str) -> Answer {
    let mut w = Writer::new();
    w.string(v);
    w.finish().into()
}

/// An empty answer.
pub fn nothing() -> Answer {
    vec![].into()
}

/// Names, at most `max` of them, as the whole answer.
pub fn names<'a>(all: impl IntoIterator<Item = &'a str>, max: i32) -> Answered {
    let max = usize::try_from(max).ok().filter(|m| *m <= LIST_MAX);
    let max = max.ok_or_else(|| VirError::argument(format!("maxnames must be 0 to {LIST_MAX}")))?;
    let all: Vec<&str> = all.into_iter().take(max).collect();
    let mut w = Writer::new();
    w.array(all, |w, name| {
        w.string(name);
    });
    Ok(w.finish().into())
}

/// A list of objects with its length, or the length alone (`need_results`), as the whole answer.
///
/// # Errors
/// RPC, when there are more than the protocol can say.
pub fn listed<T>(all: Vec<T>, need_results: i32, write: impl FnMut(&mut Writer, T)) -> Answered {
    let n = all.len();
    if n > LIST_MAX {
        return Err(VirError::rpc(format!("Too many objects '{n}' for limit '{LIST_MAX}'")));
    }
    let mut w = Writer::new();
    match need_results {
        0 => drop(w.u32(0)),
        _ => drop(w.array(all, write)),
    }
    w.u32(n as u32);
    Ok(w.finish().into())
}
