//! What happens in machines, in libvirt's words: which messages, and which changes of the domain's life.

use super::{Callback, REBOOT, Style, lifecycle, matching};
use crate::{
    calls::figures::disks,
    domain_id,
    frame::{Frame, Header},
    instance_uuid,
    session::Session,
    xdr::{Typed, Writer},
};
use karst_model::{
    display::DisplayProtocol,
    instance::Instance,
    news::{DiskErrorAction, Happened, MemoryFailureAction, WatchdogAction},
};
use std::sync::Arc;

/// A kind of domain events (`virDomainEventID`) with the procedures of its messages.
struct Kind {
    event: i32,
    /// Without a number of the callback; those that came later have none.
    plain: Option<i32>,
    numbered: i32,
}

const fn kind(event: i32, plain: i32, numbered: i32) -> Kind {
    Kind { event, plain: Some(plain), numbered }
}

const fn new_kind(event: i32, numbered: i32) -> Kind {
    Kind { event, plain: None, numbered }
}

const RESET: Kind = kind(REBOOT, 169, 319);
const RTC_CHANGE: Kind = kind(2, 170, 320);
const WATCHDOG: Kind = kind(3, 171, 321);
const IO_ERROR: Kind = kind(4, 172, 322);
const GRAPHICS: Kind = kind(5, 173, 323);
const IO_ERROR_REASON: Kind = kind(6, 195, 324);
const TRAY_CHANGE: Kind = kind(10, 268, 328);
const WAKEUP: Kind = kind(11, 269, 329);
const SUSPEND: Kind = kind(12, 270, 330);
const BALLOON_CHANGE: Kind = kind(13, 276, 331);
const SUSPEND_DISK: Kind = kind(14, 292, 332);
const DEVICE_REMOVED: Kind = kind(15, 311, 333);
const TUNABLE: Kind = new_kind(17, 346);
const AGENT_LIFECYCLE: Kind = new_kind(18, 348);
const DEVICE_ADDED: Kind = new_kind(19, 354);
const DEVICE_REMOVAL_FAILED: Kind = new_kind(22, 367);
const METADATA_CHANGE: Kind = new_kind(23, 379);
const MEMORY_FAILURE: Kind = new_kind(25, 423);

/// A message: what its numbered form has before the domain, and what both have after it.
struct Message {
    kind: Kind,
    lead: Option<i32>,
    body: Vec<u8>,
}

impl Message {
    fn new(kind: Kind, write: impl FnOnce(&mut Writer)) -> Self {
        let mut w = Writer::new();
        write(&mut w);
        Self { kind, lead: None, body: w.finish() }
    }

    /// Of which the numbered form has a reason that never says anything.
    fn without_reason(kind: Kind) -> Self {
        Self { lead: Some(0), ..Self::new(kind, |_| {}) }
    }
}

/// Where both ends of a viewer's connection are: the server listens nowhere.
fn nowhere(w: &mut Writer) {
    // VIR_DOMAIN_EVENT_GRAPHICS_ADDRESS_UNIX, without a path.
    w.i32(2).string("").string("");
}

fn viewer(phase: i32, protocol: DisplayProtocol, guarded: bool, who: &str) -> Message {
    let scheme = match (guarded, protocol) {
        (false, _) => "none",
        (true, DisplayProtocol::Vnc) => "vnc",
        (true, DisplayProtocol::Spice) => "spice",
    };
    Message::new(GRAPHICS, |w| {
        w.i32(phase);
        nowhere(w);
        nowhere(w);
        w.string(scheme);
        w.array([who], |w, who| {
            w.string("karst").string(who);
        });
    })
}

/// The messages of what happened; devices by `alias`, disks by `path`.
fn messages(what: &Happened, alias: &str, path: &str) -> Vec<Message> {
    let of_device = |kind: Kind| {
        Message::new(kind, |w| {
            w.string(alias);
        })
    };
    match what {
        Happened::Reset => vec![Message::new(RESET, |_| {})],
        Happened::ShutDown | Happened::Recovered => vec![],
        Happened::Clock { offset } => vec![Message::new(RTC_CHANGE, |w| {
            w.i64(*offset);
        })],
        Happened::Watchdog { action } => {
            let action = match action {
                WatchdogAction::None => 0,
                WatchdogAction::Pause => 1,
                WatchdogAction::Reset => 2,
                WatchdogAction::Poweroff => 3,
                WatchdogAction::Shutdown => 4,
                WatchdogAction::Debug => 5,
                WatchdogAction::InjectNmi => 6,
            };
            vec![Message::new(WATCHDOG, |w| {
                w.i32(action);
            })]
        }
        Happened::DiskError { action, full, .. } => {
            let action = match action {
                DiskErrorAction::Ignored => 0,
                DiskErrorAction::Halted => 1,
                DiskErrorAction::Reported => 2,
            };
            let reason = if *full { "enospc" } else { "" };
            vec![
                Message::new(IO_ERROR, |w| {
                    w.string(path).string(alias).i32(action);
                }),
                Message::new(IO_ERROR_REASON, |w| {
                    w.string(path).string(alias).i32(action).string(reason);
                }),
            ]
        }
        Happened::Balloon { actual } => vec![Message::new(BALLOON_CHANGE, |w| {
            w.u64(actual.div_ceil(1024));
        })],
        Happened::Tray { open, .. } => vec![Message::new(TRAY_CHANGE, |w| {
            w.string(alias).i32(i32::from(!open));
        })],
        Happened::DeviceAdded { .. } => vec![of_device(DEVICE_ADDED)],
        Happened::DeviceRemoved { .. } => vec![of_device(DEVICE_REMOVED)],
        Happened::DeviceKept { .. } => vec![of_device(DEVICE_REMOVAL_FAILED)],
        // Connected or disconnected, by its channel.
        Happened::Agent { connected } => vec![Message::new(AGENT_LIFECYCLE, |w| {
            w.i32(if *connected { 1 } else { 2 }).i32(2);
        })],
        Happened::MemoryFailure { guest, action, required, recursive } => {
            let action = match action {
                MemoryFailureAction::Ignored => 0,
                MemoryFailureAction::Injected => 1,
                MemoryFailureAction::Fatal => 2,
                MemoryFailureAction::Reset => 3,
            };
            let flags = u32::from(*required) | u32::from(*recursive) << 1;
            vec![Message::new(MEMORY_FAILURE, |w| {
                w.i32(i32::from(*guest)).i32(action).u32(flags);
            })]
        }
        Happened::Asleep { disk: false } => vec![Message::without_reason(SUSPEND)],
        Happened::Asleep { disk: true } => vec![Message::without_reason(SUSPEND_DISK)],
        Happened::Awake => vec![Message::without_reason(WAKEUP)],
        // Who need not know a password is in at once.
        Happened::Display { opened: true, protocol, guarded: false, viewer: who } => {
            vec![viewer(0, *protocol, false, who), viewer(1, *protocol, false, who)]
        }
        Happened::Display { opened: true, protocol, guarded, viewer: who } => {
            vec![viewer(0, *protocol, *guarded, who)]
        }
        Happened::Display { opened: false, protocol, guarded, viewer: who } => {
            vec![viewer(2, *protocol, *guarded, who)]
        }
    }
}

/// What it means for the domain's life: `virDomainEventType` with its detail.
fn change(what: &Happened) -> Option<(i32, i32)> {
    Some(match what {
        // Finished, by the guest.
        Happened::ShutDown => (6, 1),
        // Suspended, by an error of IO and by the watchdog.
        Happened::DiskError { action: DiskErrorAction::Halted, .. } => (3, 2),
        Happened::Watchdog { action: WatchdogAction::Pause } => (3, 3),
        Happened::Recovered => (4, 0),
        Happened::Asleep { disk } => (7, i32::from(*disk)),
        // Started, by waking up.
        Happened::Awake => (2, 4),
        _ => return None,
    })
}

/// Tells the listeners of a connection.
pub(super) async fn tell(session: &Arc<Session>, of: &Instance, what: &Happened) {
    let view = session.guest(&of.name).ok().filter(|v| v.instance.id == of.id);
    let identity = |slot: &str| {
        let now = view.as_ref().and_then(|v| v.instance.identities.values().find(|i| i.slot == slot));
        now.or_else(|| of.identities.values().find(|i| i.slot == slot)).map(|i| i.alias.clone())
    };
    // One that is gone has no alias any more but that which it is given.
    let alias = what.slot().map(|slot| identity(slot).unwrap_or_else(|| slot.to_owned()));
    let path = match (what, &view) {
        (Happened::DiskError { slot, .. }, Some(view)) => {
            let all = disks(&session.front.engine.inner().inventory.read(), view);
            all.into_iter().find(|d| d.slot == *slot).and_then(|d| d.path)
        }
        _ => None,
    };
    let id = view.as_ref().map_or(-1, |v| domain_id(v));
    for message in messages(what, alias.as_deref().unwrap_or_default(), path.as_deref().unwrap_or_default()) {
        send(session, of, id, &message).await;
    }
    if let Some(change) = change(what) {
        lifecycle(session, &of.name, instance_uuid(of), id, &[change]).await;
    }
}

/// Tells that what people or applications say of a domain changed: `virDomainMetadataType`, and whose.
pub(super) async fn described(session: &Arc<Session>, of: &Instance, id: i32, about: i32, uri: Option<&str>) {
    let message = Message::new(METADATA_CHANGE, |w| {
        w.i32(about).optional(uri);
    });
    send(session, of, id, &message).await;
}

/// Tells that the run of a domain is tuned otherwise now.
pub(super) async fn tuned(session: &Arc<Session>, of: &Instance, id: i32, parameters: &[(String, Typed)]) {
    let message = Message::new(TUNABLE, |w| {
        w.array(parameters, |w, (field, value)| {
            w.typed(field, value);
        });
    });
    send(session, of, id, &message).await;
}

async fn send(session: &Arc<Session>, of: &Instance, id: i32, message: &Message) {
    let uuid = instance_uuid(of);
    let wanted =
        |c: &Callback| c.event == message.kind.event && matches!(c.style, Style::Plain | Style::Numbered);
    for (number, callback) in matching(session, uuid, wanted) {
        let mut w = Writer::new();
        let procedure = match (callback.style, message.kind.plain) {
            (Style::Numbered, _) => {
                w.i32(number);
                if let Some(lead) = message.lead {
                    w.i32(lead);
                }
                message.kind.numbered
            }
            (_, Some(plain)) => plain,
            (_, None) => continue,
        };
        w.string(&of.name).uuid(uuid).i32(id);
        let payload = [w.finish(), message.body.clone()].concat();
        session.send(Frame::new(Header::event(procedure), payload)).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_kinds_share_a_number() {
        let all = [
            RESET,
            RTC_CHANGE,
            WATCHDOG,
            IO_ERROR,
            GRAPHICS,
            IO_ERROR_REASON,
            TRAY_CHANGE,
            WAKEUP,
            SUSPEND,
            BALLOON_CHANGE,
            SUSPEND_DISK,
            DEVICE_REMOVED,
            TUNABLE,
            AGENT_LIFECYCLE,
            DEVICE_ADDED,
            DEVICE_REMOVAL_FAILED,
            METADATA_CHANGE,
            MEMORY_FAILURE,
        ];
        let numbers: std::collections::BTreeSet<i32> = all.iter().map(|k| k.numbered).collect();
        let events: std::collections::BTreeSet<i32> = all.iter().map(|k| k.event).collect();
        assert_eq!((numbers.len(), events.len()), (all.len(), all.len()));
        assert!(!events.contains(&super::super::LIFECYCLE));
    }
}
