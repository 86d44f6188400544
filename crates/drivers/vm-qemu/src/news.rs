//! What QEMU's events say that is worth telling. Pure, but for [`Budget`], which bounds what a guest can have told.
//!
//! Source of the events: QEMU's schema (`qapi/*.json`).

use crate::{
    devices::{Side, device_id},
    qmp::Event,
};
use karst_model::news::{DiskErrorAction, Happened, MemoryFailureAction, WatchdogAction};
use serde_json::Value;
use std::time::Duration;
use tokio::time::Instant;

/// News of one machine in [`WINDOW`]; QEMU itself limits only some that a guest can cause.
const MOST: u32 = 128;
const WINDOW: Duration = Duration::from_secs(10);

/// How many news of a machine are told.
#[derive(Debug)]
pub(crate) struct Budget {
    since: Instant,
    told: u32,
}

impl Default for Budget {
    fn default() -> Self {
        Self { since: Instant::now(), told: 0 }
    }
}

impl Budget {
    /// May one more be told now?
    pub(crate) fn take(&mut self) -> bool {
        if self.since.elapsed() >= WINDOW {
            *self = Self::default();
        }
        self.told = self.told.saturating_add(1);
        self.told <= MOST
    }
}

/// The slot of a device by its id in QEMU; nothing of one that is part of the machine.
pub(crate) fn slot_of(id: &str) -> Option<String> {
    let disk = device_id("");
    match id.strip_prefix(disk.as_str()) {
        Some(slot) => Some(slot.to_owned()),
        None if id.starts_with("net") || id.starts_with("eth") => Some(id.to_owned()),
        None => None,
    }
}

/// The slot of a disk by the node that its device drives, or by the filter above that while it is copied.
pub(crate) fn slot_of_node(node: &str) -> Option<String> {
    let side = Side::First;
    let begins = [side.name('d', ""), side.filter("")];
    let slot = begins.iter().find_map(|b| node.strip_prefix(b.as_str()))?;
    Some(slot.strip_suffix(".2").unwrap_or(slot).to_owned())
}

/// What an event says, if it is for anybody.
pub(crate) fn of(event: &Event) -> Option<Happened> {
    let value = |key: &str| event.data.get(key);
    let text = |key: &str| value(key).and_then(Value::as_str);
    let flag = |key: &str| value(key).and_then(Value::as_bool);
    let device = || text("device").and_then(slot_of);
    Some(match event.name.as_str() {
        "RESET" => Happened::Reset,
        "SHUTDOWN" if flag("guest") == Some(true) => Happened::ShutDown,
        "RTC_CHANGE" => Happened::Clock { offset: value("offset")?.as_i64()? },
        "WATCHDOG" => Happened::Watchdog {
            action: match text("action")? {
                "none" => WatchdogAction::None,
                "pause" => WatchdogAction::Pause,
                "reset" => WatchdogAction::Reset,
                "poweroff" => WatchdogAction::Poweroff,
                "shutdown" => WatchdogAction::Shutdown,
                "debug" => WatchdogAction::Debug,
                "inject-nmi" => WatchdogAction::InjectNmi,
                _ => return None,
            },
        },
        "BLOCK_IO_ERROR" => Happened::DiskError {
            slot: text("node-name").and_then(slot_of_node)?,
            action: match text("action")? {
                "ignore" => DiskErrorAction::Ignored,
                "stop" => DiskErrorAction::Halted,
                "report" => DiskErrorAction::Reported,
                _ => return None,
            },
            full: flag("nospace") == Some(true),
        },
        "BALLOON_CHANGE" => Happened::Balloon { actual: value("actual")?.as_u64()? },
        "DEVICE_TRAY_MOVED" => {
            Happened::Tray { slot: text("id").and_then(slot_of)?, open: flag("tray-open")? }
        }
        "DEVICE_DELETED" => Happened::DeviceRemoved { slot: device()? },
        "DEVICE_UNPLUG_GUEST_ERROR" => Happened::DeviceKept { slot: device()? },
        "MEMORY_FAILURE" => {
            let said =
                |key: &str| value("flags").and_then(|f| f.get(key)).and_then(Value::as_bool) == Some(true);
            Happened::MemoryFailure {
                guest: text("recipient")? == "guest",
                action: match text("action")? {
                    "ignore" => MemoryFailureAction::Ignored,
                    "inject" => MemoryFailureAction::Injected,
                    "fatal" => MemoryFailureAction::Fatal,
                    "reset" => MemoryFailureAction::Reset,
                    _ => return None,
                },
                required: said("action-required"),
                recursive: said("recursive"),
            }
        }
        "SUSPEND" => Happened::Asleep { disk: false },
        "SUSPEND_DISK" => Happened::Asleep { disk: true },
        "WAKEUP" => Happened::Awake,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn said(name: &str, data: Value) -> Option<Happened> {
        let Value::Object(data) = data else { unreachable!("an object") };
        of(&Event { name: name.into(), data, at: (0, 0) })
    }

    #[test]
    fn events_of_the_schema_are_told_in_our_words() {
        let slot = || "scsi0".to_owned();
        for (name, data, news) in [
            ("RESET", json!({"guest": true, "reason": "guest-reset"}), Some(Happened::Reset)),
            ("SHUTDOWN", json!({"guest": true, "reason": "guest-shutdown"}), Some(Happened::ShutDown)),
            ("SHUTDOWN", json!({"guest": false, "reason": "host-qmp-quit"}), None),
            (
                "RTC_CHANGE",
                json!({"offset": -3600, "qom-path": "/x"}),
                Some(Happened::Clock { offset: -3600 }),
            ),
            (
                "WATCHDOG",
                json!({"action": "inject-nmi"}),
                Some(Happened::Watchdog { action: WatchdogAction::InjectNmi }),
            ),
            ("WATCHDOG", json!({"action": "bark"}), None),
            (
                "BLOCK_IO_ERROR",
                json!({"device": "", "node-name": "d-scsi0.2", "operation": "write", "action": "stop", "nospace": true, "reason": "x"}),
                Some(Happened::DiskError { slot: slot(), action: DiskErrorAction::Halted, full: true }),
            ),
            ("BLOCK_IO_ERROR", json!({"device": "", "node-name": "seed", "action": "report"}), None),
            ("BALLOON_CHANGE", json!({"actual": 4096}), Some(Happened::Balloon { actual: 4096 })),
            (
                "DEVICE_TRAY_MOVED",
                json!({"device": "", "id": "disk-scsi0", "tray-open": true}),
                Some(Happened::Tray { slot: slot(), open: true }),
            ),
            (
                "DEVICE_DELETED",
                json!({"device": "disk-scsi0", "path": "/x"}),
                Some(Happened::DeviceRemoved { slot: slot() }),
            ),
            ("DEVICE_DELETED", json!({"path": "/machine/peripheral/net1/virtio-backend"}), None),
            (
                "DEVICE_DELETED",
                json!({"device": "net1", "path": "/x"}),
                Some(Happened::DeviceRemoved { slot: "net1".into() }),
            ),
            ("DEVICE_DELETED", json!({"device": "cpu-3", "path": "/x"}), None),
            (
                "DEVICE_UNPLUG_GUEST_ERROR",
                json!({"device": "disk-scsi0", "path": "/x"}),
                Some(Happened::DeviceKept { slot: slot() }),
            ),
            (
                "MEMORY_FAILURE",
                json!({"recipient": "guest", "action": "inject", "flags": {"action-required": true, "recursive": false}}),
                Some(Happened::MemoryFailure {
                    guest: true,
                    action: MemoryFailureAction::Injected,
                    required: true,
                    recursive: false,
                }),
            ),
            ("SUSPEND", json!({}), Some(Happened::Asleep { disk: false })),
            ("WAKEUP", json!({}), Some(Happened::Awake)),
            ("NIC_RX_FILTER_CHANGED", json!({}), None),
        ] {
            assert_eq!(said(name, data.clone()), news, "{name} {data}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_a_guest_can_have_told_is_bounded() {
        let mut budget = Budget::default();
        assert_eq!((0..1000).filter(|_| budget.take()).count(), MOST as usize);
        tokio::time::advance(WINDOW).await;
        assert!(budget.take());
    }
}
