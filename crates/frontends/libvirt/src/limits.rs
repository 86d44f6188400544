//! CPUs and memory of a guest as libvirt counts them: a container without limits has those of its host.

use crate::{calls::connect::facts, error::VirError, session::Call};
use karst_engine::InstanceView;
use karst_model::{
    Config,
    instance::InstanceKind,
    keys, spec,
    threads::{self, Thread},
};

/// Memory of a virtual machine that says nothing, bytes.
const MACHINE_MEMORY: u64 = 1 << 30;

/// Limits of a guest.
pub struct Limits {
    kind: InstanceKind,
    limits: spec::Limits,
}

/// Those of a guest: what it runs with, else what it will start with.
///
/// # Errors
/// Invalid, when its configuration is.
pub fn of(view: &InstanceView) -> Result<Limits, VirError> {
    of_config(view.instance.kind, view.run().map_or(&view.expanded_config, |run| &run.config))
}

/// Those of a configuration.
///
/// # Errors
/// Invalid, when it is.
pub fn of_config(kind: InstanceKind, config: &Config) -> Result<Limits, VirError> {
    Ok(Limits { kind, limits: keys::limits(config)? })
}

impl Limits {
    /// CPUs.
    ///
    /// # Errors
    /// Those of asking for the host's.
    pub fn cpus(&self, call: &Call) -> Result<u32, VirError> {
        match (&self.limits.cpu, self.kind) {
            (Some(spec::CpuLimit::Count { n }), _) => Ok(*n),
            (Some(spec::CpuLimit::Set { cpus }), _) => Ok(cpus.len() as u32),
            (None, InstanceKind::VirtualMachine) => Ok(1),
            (None, InstanceKind::Container) => Ok(facts(call)?.cpus),
        }
    }

    /// CPUs of the host that it is pinned to: those of its threads that are not pinned apart.
    pub fn pinned(&self) -> Option<&[u32]> {
        self.runs_on(Thread::Default)
    }

    /// CPUs of the host that a thread of it is pinned to.
    pub fn runs_on(&self, thread: Thread) -> Option<&[u32]> {
        threads::pinned(&self.limits.pins, thread).or_else(|| self.set())
    }

    /// CPUs of the host that `limits.cpu` names.
    pub fn set(&self) -> Option<&[u32]> {
        match &self.limits.cpu {
            Some(spec::CpuLimit::Set { cpus }) => Some(cpus),
            _ => None,
        }
    }

    /// Memory in KiB.
    ///
    /// # Errors
    /// Those of asking for the host's.
    pub fn memory_kib(&self, call: &Call) -> Result<u64, VirError> {
        let memory = match self.limits.memory_share {
            Some(_) => self.limits.memory_on(facts(call)?.memory),
            None => self.limits.memory,
        };
        let bytes = match (memory, self.kind) {
            (Some(size), InstanceKind::VirtualMachine) => size.round_up(1 << 20).bytes(),
            (Some(size), InstanceKind::Container) => size.bytes(),
            (None, InstanceKind::VirtualMachine) => MACHINE_MEMORY,
            (None, InstanceKind::Container) => facts(call)?.memory,
        };
        Ok(bytes / 1024)
    }
}
