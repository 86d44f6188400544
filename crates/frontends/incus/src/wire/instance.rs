//! Instances and their state.

use super::{NOWHERE, misc::AddressView, time, time_or_epoch};
use jiff::Timestamp;
use karst_engine::InstanceView as View;
use karst_model::{
    device::Devices,
    guest::{AgentKind, GuestSystem, Interface, Metrics},
    instance::Status,
};
use serde::{Serialize, Serializer, ser::SerializeMap};
use std::{borrow::Cow, collections::BTreeMap};

/// Incus' word and code for a status.
pub fn status(status: Status) -> (&'static str, u16) {
    match status {
        Status::Stopped => ("Stopped", 102),
        Status::Starting => ("Starting", 106),
        Status::Running => ("Running", 103),
        Status::Frozen => ("Frozen", 110),
        Status::Stopping => ("Stopping", 107),
        Status::Error => ("Error", 112),
    }
}

/// An instance.
#[derive(Debug, Serialize)]
#[allow(missing_docs)]
pub struct InstanceView<'a> {
    pub architecture: &'a str,
    pub config: Merged<'a>,
    pub devices: &'a Devices,
    pub ephemeral: bool,
    pub profiles: Vec<&'a str>,
    pub stateful: bool,
    pub description: &'a str,
    pub created_at: Timestamp,
    pub expanded_config: Merged<'a>,
    pub expanded_devices: &'a Devices,
    pub name: &'a str,
    pub status: &'static str,
    pub status_code: u16,
    #[serde(serialize_with = "time_or_epoch")]
    pub last_used_at: Option<Timestamp>,
    pub location: &'static str,
    #[serde(rename = "type")]
    pub kind: &'static str,
    pub project: &'a str,
}

/// A configuration with what the platform knows under it: properties of the image and `volatile.*`.
#[derive(Debug, Clone)]
pub struct Merged<'a>(BTreeMap<Cow<'a, str>, Cow<'a, str>>);

impl Serialize for Merged<'_> {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        let mut map = s.serialize_map(Some(self.0.len()))?;
        for (k, v) in &self.0 {
            map.serialize_entry(k, v)?;
        }
        map.end()
    }
}

impl<'a> Merged<'a> {
    fn of(view: &'a View) -> Self {
        let i = &view.instance;
        let mut all: BTreeMap<Cow<'a, str>, Cow<'a, str>> = BTreeMap::new();
        let power = if view.status.is_down() { "STOPPED" } else { "RUNNING" };
        all.insert("volatile.last_state.power".into(), power.into());
        all.insert("volatile.uuid".into(), i.id.to_string().into());
        let running = !matches!(view.status, Status::Stopped);
        // Of a device of the run only as long as that lasts.
        let there = |name: &String| {
            view.expanded_devices.contains_key(name)
                || view.run().is_some_and(|run| run.devices.contains_key(name))
        };
        for (name, identity) in i.identities.iter().filter(|(name, _)| there(name)) {
            if let Some(mac) = &identity.mac {
                all.insert(format!("volatile.{name}.hwaddr").into(), mac.as_str().into());
            }
            if let Some(host) = identity.host_interface.as_ref().filter(|_| running) {
                all.insert(format!("volatile.{name}.host_name").into(), host.as_str().into());
            }
        }
        for source in [&i.image_properties, &i.volatile] {
            all.extend(source.iter().map(|(k, v)| (k.as_str().into(), v.as_str().into())));
        }
        Self(all)
    }

    fn with(mut self, config: &'a karst_model::Config) -> Self {
        self.0.extend(config.iter().map(|(k, v)| (Cow::from(k.as_str()), Cow::from(v.as_str()))));
        self
    }
}

impl<'a> InstanceView<'a> {
    /// Of the engine's view.
    pub fn of(view: &'a View) -> Self {
        let i = &view.instance;
        let (status, status_code) = status(view.status);
        let base = Merged::of(view);
        Self {
            architecture: &i.architecture,
            config: base.clone().with(&i.config),
            devices: &i.devices,
            ephemeral: i.ephemeral,
            profiles: view.profiles.iter().map(|p| p.name.as_str()).collect(),
            stateful: i.stateful,
            description: &i.description,
            created_at: i.created_at,
            expanded_config: base.with(&view.expanded_config),
            expanded_devices: &view.expanded_devices,
            name: &i.name,
            status,
            status_code,
            last_used_at: i.last_used_at,
            location: NOWHERE,
            kind: i.kind.as_str(),
            project: &view.project.name,
        }
    }
}

/// The system inside.
#[derive(Debug, Serialize)]
#[allow(missing_docs)] // the fields are Incus' own
pub struct OsView<'a> {
    pub os: &'a str,
    pub os_version: &'a str,
    pub kernel_version: &'a str,
    pub hostname: &'a str,
    pub fqdn: &'a str,
    /// Of Karst: which agent tells it, `karst` or `qemu`.
    pub agent: AgentKind,
}

impl<'a> OsView<'a> {
    fn of(s: &'a GuestSystem) -> Self {
        Self {
            os: &s.os,
            os_version: &s.os_version,
            kernel_version: &s.kernel,
            hostname: &s.hostname,
            fqdn: &s.fqdn,
            agent: s.agent,
        }
    }
}

/// State of an instance.
#[derive(Debug, Serialize)]
#[allow(missing_docs)]
pub struct StateView<'a> {
    pub status: &'static str,
    pub status_code: u16,
    pub disk: BTreeMap<&'static str, u64>,
    pub memory: MemoryView,
    pub network: Option<BTreeMap<&'a str, InterfaceView<'a>>>,
    pub pid: i64,
    pub processes: i64,
    pub cpu: CpuView,
    #[serde(serialize_with = "time")]
    pub started_at: Option<Timestamp>,
    pub os_info: Option<OsView<'a>>,
    /// Why it is halted, or how it ended by itself, in words.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub karst_reason: Option<String>,
}

/// Memory.
#[derive(Debug, Serialize, Default)]
#[allow(missing_docs)]
pub struct MemoryView {
    pub usage: u64,
    pub usage_peak: u64,
    pub total: u64,
    pub swap_usage: u64,
    pub swap_usage_peak: u64,
}

/// CPU time in nanoseconds.
#[derive(Debug, Serialize, Default)]
#[allow(missing_docs)]
pub struct CpuView {
    pub usage: i64,
    pub allocated_time: i64,
}

/// An interface as the guest sees it.
#[derive(Debug, Serialize)]
#[allow(missing_docs)]
pub struct InterfaceView<'a> {
    pub addresses: Vec<AddressView>,
    pub counters: Counters,
    pub hwaddr: &'a str,
    pub host_name: &'a str,
    pub mtu: u32,
    pub state: &'static str,
    #[serde(rename = "type")]
    pub kind: &'static str,
}

/// Counters of an interface.
#[derive(Debug, Serialize, Default)]
#[allow(missing_docs)]
pub struct Counters {
    pub bytes_received: u64,
    pub bytes_sent: u64,
    pub packets_received: u64,
    pub packets_sent: u64,
    pub errors_received: u64,
    pub errors_sent: u64,
    pub packets_dropped_outbound: u64,
    pub packets_dropped_inbound: u64,
}

impl<'a> InterfaceView<'a> {
    fn of(i: &'a Interface) -> Self {
        let [bytes_received, bytes_sent, packets_received, packets_sent] = i.counters;
        let [errors_received, errors_sent, packets_dropped_inbound, packets_dropped_outbound] = i.losses;
        Self {
            addresses: i.addresses.iter().map(AddressView::of).collect(),
            counters: Counters {
                bytes_received,
                bytes_sent,
                packets_received,
                packets_sent,
                errors_received,
                errors_sent,
                packets_dropped_outbound,
                packets_dropped_inbound,
            },
            hwaddr: &i.mac,
            host_name: &i.host_name,
            mtu: i.mtu,
            state: if i.up { "up" } else { "down" },
            kind: if i.loopback { "loopback" } else { "broadcast" },
        }
    }
}

impl<'a> StateView<'a> {
    /// Of the engine's view and the figures of a running guest. Where a figure is missing Incus' clients know no way to
    /// say so: 0 for memory, -1 for counts.
    pub fn of(view: &View, metrics: Option<&'a Metrics>) -> Self {
        let (status, status_code) = status(view.status);
        let runs = !view.status.is_down();
        let runtime = view.runtime.as_deref().filter(|_| runs);
        let none = Metrics::default();
        let m = metrics.unwrap_or(&none);
        Self {
            status,
            status_code,
            disk: BTreeMap::new(),
            memory: MemoryView {
                usage: m.memory.unwrap_or(0),
                usage_peak: m.memory_peak.unwrap_or(0),
                total: m.memory_total.unwrap_or(0),
                swap_usage: m.swap.unwrap_or(0),
                swap_usage_peak: 0,
            },
            network: metrics
                .map(|m| m.interfaces.iter().map(|(n, i)| (n.as_str(), InterfaceView::of(i))).collect()),
            pid: runtime.and_then(|r| r.pid).map_or(0, i64::from),
            processes: match m.processes {
                Some(n) => i64::try_from(n).unwrap_or(i64::MAX),
                None if runs => -1,
                None => 0,
            },
            cpu: CpuView {
                usage: m.cpu_ns.and_then(|n| i64::try_from(n).ok()).unwrap_or(0),
                allocated_time: 0,
            },
            started_at: runtime.and_then(|r| r.started_at),
            os_info: metrics.and_then(|m| m.system.as_ref()).map(OsView::of),
            karst_reason: view.reason.clone(),
        }
    }
}
