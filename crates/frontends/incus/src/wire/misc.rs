//! Networks, pools, volumes, profiles, projects, warnings, resources.

use super::NOWHERE;
use jiff::Timestamp;
use karst_model::{
    Config, device::Devices, network::Network, profile::Profile, project::Project, storage::Pool,
};
use serde::Serialize;
use std::collections::BTreeMap;

/// A managed network.
#[derive(Debug, Serialize)]
#[allow(missing_docs)]
pub struct NetworkView<'a> {
    pub config: &'a Config,
    pub description: &'a str,
    pub name: &'a str,
    #[serde(rename = "type")]
    pub kind: &'static str,
    pub used_by: Vec<String>,
    pub managed: bool,
    pub status: &'static str,
    pub locations: [&'static str; 1],
    pub project: &'a str,
}

impl<'a> NetworkView<'a> {
    /// Of a record.
    pub fn of(network: &'a Network, used_by: Vec<String>, project: &'a str) -> Self {
        Self {
            config: &network.config,
            description: &network.description,
            name: &network.name,
            kind: network.kind.as_str(),
            used_by,
            managed: true,
            // Incus' words: one that is stopped is there, and of no use now.
            status: if network.is_active() { "Created" } else { "Unavailable" },
            locations: [NOWHERE],
            project,
        }
    }
}

/// An address of an interface.
#[derive(Debug, Serialize)]
#[allow(missing_docs)]
pub struct AddressView {
    pub family: &'static str,
    pub address: String,
    pub netmask: String,
    pub scope: String,
}

impl AddressView {
    /// Of address, prefix and scope.
    pub fn of((address, prefix, scope): &(std::net::IpAddr, u8, String)) -> Self {
        Self {
            family: if address.is_ipv4() { "inet" } else { "inet6" },
            address: address.to_string(),
            netmask: prefix.to_string(),
            scope: scope.clone(),
        }
    }
}

/// State of a network's bridge.
#[derive(Debug, Serialize)]
#[allow(missing_docs)]
pub struct NetworkStateView {
    pub addresses: Vec<AddressView>,
    pub counters: NetworkCounters,
    pub hwaddr: String,
    pub mtu: u32,
    pub state: &'static str,
    #[serde(rename = "type")]
    pub kind: &'static str,
    pub bond: (),
    pub bridge: Option<BridgeView>,
    pub vlan: (),
    pub ovn: (),
}

/// Counters of a network.
#[derive(Debug, Serialize)]
#[allow(missing_docs)]
pub struct NetworkCounters {
    pub bytes_received: u64,
    pub bytes_sent: u64,
    pub packets_received: u64,
    pub packets_sent: u64,
}

/// What a bridge is.
#[derive(Debug, Serialize)]
#[allow(missing_docs)]
pub struct BridgeView {
    pub id: String,
    pub stp: bool,
    pub forward_delay: u32,
    pub vlan_default: u32,
    pub vlan_filtering: bool,
    pub upper_devices: Vec<String>,
}

/// A lease.
#[derive(Debug, Serialize)]
#[allow(missing_docs)]
pub struct LeaseView {
    pub hostname: String,
    pub hwaddr: String,
    pub address: String,
    #[serde(rename = "type")]
    pub kind: &'static str,
    pub location: &'static str,
    pub project: String,
}

/// A storage pool.
#[derive(Debug, Serialize)]
#[allow(missing_docs)]
pub struct PoolView<'a> {
    pub config: &'a Config,
    pub description: &'a str,
    pub name: &'a str,
    pub driver: &'static str,
    pub used_by: Vec<String>,
    pub status: &'static str,
    pub locations: [&'static str; 1],
}

impl<'a> PoolView<'a> {
    /// Of a record.
    pub fn of(pool: &'a Pool, used_by: Vec<String>) -> Self {
        Self {
            config: &pool.config,
            description: &pool.description,
            name: &pool.name,
            driver: pool.kind.as_str(),
            used_by,
            // One that its host has let go of is there, and cannot be used.
            status: if pool.life.stopped { "Unavailable" } else { "Created" },
            locations: [NOWHERE],
        }
    }
}

/// A storage volume.
#[derive(Debug, Serialize)]
#[allow(missing_docs)]
pub struct VolumeView<'a> {
    pub config: Config,
    pub description: &'a str,
    pub name: &'a str,
    #[serde(rename = "type")]
    pub kind: &'static str,
    pub used_by: Vec<String>,
    pub location: &'static str,
    pub content_type: &'static str,
    pub project: &'a str,
    pub created_at: Timestamp,
}

/// Space and inodes of a pool.
#[derive(Debug, Serialize)]
#[allow(missing_docs)]
pub struct PoolResources {
    pub space: UsedTotal,
    pub inodes: UsedTotal,
}

/// Used and total.
#[derive(Debug, Serialize)]
#[allow(missing_docs)]
pub struct UsedTotal {
    pub used: u64,
    pub total: u64,
}

/// A profile.
#[derive(Debug, Serialize)]
#[allow(missing_docs)]
pub struct ProfileView<'a> {
    pub config: &'a Config,
    pub description: &'a str,
    pub devices: &'a Devices,
    pub name: &'a str,
    pub used_by: Vec<String>,
    pub project: &'a str,
}

impl<'a> ProfileView<'a> {
    /// Of a record.
    pub fn of(profile: &'a Profile, used_by: Vec<String>, project: &'a str) -> Self {
        Self {
            config: &profile.config,
            description: &profile.description,
            devices: &profile.devices,
            name: &profile.name,
            used_by,
            project,
        }
    }
}

/// A project.
#[derive(Debug, Serialize)]
#[allow(missing_docs)]
pub struct ProjectView<'a> {
    pub config: &'a Config,
    pub description: &'a str,
    pub name: &'a str,
    pub used_by: Vec<String>,
}

impl<'a> ProjectView<'a> {
    /// Of a record.
    pub fn of(project: &'a Project, used_by: Vec<String>) -> Self {
        Self { config: &project.config, description: &project.description, name: &project.name, used_by }
    }
}

/// Limits and use of a project.
#[derive(Debug, Serialize)]
#[allow(missing_docs)]
pub struct ProjectStateView {
    pub resources: BTreeMap<String, LimitUsage>,
}

/// Limit (-1: none) and use.
#[derive(Debug, Serialize)]
#[allow(missing_docs)]
#[serde(rename_all = "PascalCase")]
pub struct LimitUsage {
    pub limit: i64,
    pub usage: i64,
}

/// A trusted certificate.
#[derive(Debug, Serialize)]
#[allow(missing_docs)]
pub struct CertificateView<'a> {
    pub name: &'a str,
    #[serde(rename = "type")]
    pub kind: &'static str,
    pub restricted: bool,
    pub projects: Vec<String>,
    pub certificate: &'a str,
    pub fingerprint: &'a str,
    pub description: &'a str,
}

/// A warning.
#[derive(Debug, Serialize)]
#[allow(missing_docs)]
pub struct WarningView<'a> {
    pub status: &'static str,
    pub uuid: String,
    pub location: &'static str,
    pub project: String,
    #[serde(rename = "type")]
    pub kind: &'a str,
    pub count: u32,
    pub first_seen_at: Timestamp,
    pub last_seen_at: Timestamp,
    pub last_message: &'a str,
    pub severity: &'static str,
    pub entity_url: &'a str,
}
