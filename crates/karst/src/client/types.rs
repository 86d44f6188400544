//! The parts of Incus' API objects that this program looks into; everything else is passed through as JSON.

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer};
use serde_json::Value;

/// Status code of an operation that was cancelled.
const CANCELLED: u16 = 401;
/// Status codes below are those of work going on.
const FIRST_FINAL: u16 = 200;

/// `null` where a list or map is expected means empty: Go servers send both.
fn nullable<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Default + Deserialize<'de>,
{
    Ok(Option::<T>::deserialize(deserializer)?.unwrap_or_default())
}

/// The envelope of every answer.
#[derive(Debug, Deserialize)]
pub struct Envelope {
    /// `sync`, `async` or `error`.
    #[serde(rename = "type", default)]
    pub kind: String,
    /// Path of the operation of an `async` answer.
    #[serde(default)]
    pub operation: String,
    /// Text of an `error` answer.
    #[serde(default)]
    pub error: String,
    /// HTTP status of an `error` answer.
    #[serde(default)]
    pub error_code: u16,
    /// What was asked for; the operation itself when `async`.
    #[serde(default)]
    pub metadata: Value,
}

/// Background work of the server.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Operation {
    /// UUID.
    pub id: String,
    /// `task`, `websocket` or `token`.
    pub class: String,
    /// What it does, in words.
    pub description: String,
    /// State in words.
    pub status: String,
    /// State as a number: 1xx going on, 200 done, 400 failed, 401 cancelled.
    pub status_code: u16,
    /// Whether DELETE ends it.
    pub may_cancel: bool,
    /// Progress, secrets of websockets, results.
    #[serde(deserialize_with = "nullable")]
    pub metadata: Value,
    /// What it works on: kind to paths.
    #[serde(deserialize_with = "nullable")]
    pub resources: BTreeMap<String, Vec<String>>,
    /// Why it failed.
    pub err: String,
    /// RFC 3339.
    pub created_at: String,
}

impl Operation {
    /// Whether nothing will change any more.
    pub fn is_final(&self) -> bool {
        self.status_code >= FIRST_FINAL
    }

    /// Whether it ended by being cancelled.
    pub fn is_cancelled(&self) -> bool {
        self.status_code == CANCELLED
    }

    /// Whether it ended well.
    pub fn is_success(&self) -> bool {
        (FIRST_FINAL..400).contains(&self.status_code)
    }

    /// The first resource of `kind`, as a path of the API.
    pub fn resource(&self, kind: &str) -> Option<&str> {
        self.resources.get(kind)?.first().map(String::as_str)
    }

    /// The secret of the websocket of stream `name` (`0`, `1`, `2`, `control`).
    pub fn stream_secret(&self, name: &str) -> Option<&str> {
        self.metadata.get("fds")?.get(name)?.as_str()
    }
}

/// A message of the events websocket.
#[derive(Debug, Deserialize)]
pub struct Event {
    /// `lifecycle`, `operation`, `logging`, ...
    #[serde(rename = "type", default)]
    pub kind: String,
    /// RFC 3339.
    #[serde(default)]
    pub timestamp: String,
    /// Project that it belongs to.
    #[serde(default)]
    pub project: String,
    /// Depends on the kind.
    #[serde(default)]
    pub metadata: Value,
}

/// An instance, as in lists with `recursion=2` (state and snapshots may be missing).
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Instance {
    /// Name, unique in its project.
    pub name: String,
    /// Project.
    pub project: String,
    /// `Running`, `Stopped`, ...
    pub status: String,
    /// `container` or `virtual-machine`.
    #[serde(rename = "type")]
    pub kind: String,
    /// `x86_64`, ...
    pub architecture: String,
    /// Free text.
    pub description: String,
    /// Deleted when stopped.
    pub ephemeral: bool,
    /// Host in a cluster.
    pub location: String,
    /// RFC 3339.
    pub created_at: String,
    /// RFC 3339; the epoch means never.
    pub last_used_at: String,
    /// Keys with those of the profiles.
    #[serde(deserialize_with = "nullable")]
    pub expanded_config: BTreeMap<String, String>,
    /// Devices with those of the profiles.
    #[serde(deserialize_with = "nullable")]
    pub expanded_devices: BTreeMap<String, BTreeMap<String, String>>,
    /// Names of profiles.
    #[serde(deserialize_with = "nullable")]
    pub profiles: Vec<String>,
    /// The number that clients of Proxmox know it by; no part of Incus' own answer.
    pub vmid: Option<u64>,
    /// What the host sees, when asked for.
    pub state: Option<State>,
    /// Snapshots, when asked for.
    #[serde(deserialize_with = "nullable")]
    pub snapshots: Vec<Snapshot>,
}

/// One snapshot of an instance.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Snapshot {
    /// Name, unique in the instance.
    pub name: String,
    /// RFC 3339.
    pub created_at: String,
    /// RFC 3339; year 1 means never.
    pub expires_at: String,
    /// With memory.
    pub stateful: bool,
}

/// What the host sees of an instance.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct State {
    /// Process id of its first process on the host.
    pub pid: i64,
    /// Processes inside.
    pub processes: i64,
    /// RFC 3339; year 1 when not running.
    pub started_at: String,
    /// Why it is halted, or how it ended by itself.
    pub karst_reason: String,
    /// Processor.
    #[serde(deserialize_with = "nullable")]
    pub cpu: Cpu,
    /// Memory.
    #[serde(deserialize_with = "nullable")]
    pub memory: Memory,
    /// By device name.
    #[serde(deserialize_with = "nullable")]
    pub disk: BTreeMap<String, Disk>,
    /// By interface name.
    #[serde(deserialize_with = "nullable")]
    pub network: BTreeMap<String, Nic>,
}

/// Processor use.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Cpu {
    /// Nanoseconds since start.
    pub usage: i64,
}

/// Memory use in bytes.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Memory {
    /// Used now.
    pub usage: i64,
    /// Most used since start.
    pub usage_peak: i64,
    /// Limit.
    pub total: i64,
    /// Swapped.
    pub swap_usage: i64,
}

/// Disk use in bytes.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Disk {
    /// Used.
    pub usage: i64,
    /// Size.
    pub total: i64,
}

/// One network interface of an instance.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Nic {
    /// Addresses.
    #[serde(deserialize_with = "nullable")]
    pub addresses: Vec<Address>,
    /// Traffic.
    #[serde(deserialize_with = "nullable")]
    pub counters: Counters,
    /// MAC.
    pub hwaddr: String,
    /// Name on the host.
    pub host_name: String,
    /// Bytes.
    pub mtu: i64,
    /// `up` or `down`.
    pub state: String,
    /// `broadcast`, `loopback`, ...
    #[serde(rename = "type")]
    pub kind: String,
}

/// An address of an interface.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Address {
    /// `inet` or `inet6`.
    pub family: String,
    /// Without the prefix length.
    pub address: String,
    /// Prefix length.
    pub netmask: String,
    /// `global`, `link` or `local`.
    pub scope: String,
}

/// Traffic in bytes and packets.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Counters {
    /// Bytes in.
    pub bytes_received: i64,
    /// Bytes out.
    pub bytes_sent: i64,
    /// Packets in.
    pub packets_received: i64,
    /// Packets out.
    pub packets_sent: i64,
}
