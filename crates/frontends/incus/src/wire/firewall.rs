//! Network ACLs, address sets, forwards.

use super::NOWHERE;
use karst_model::{
    Config,
    firewall::{AclRule, AddressSet, ForwardPort, NetworkAcl, NetworkForward},
};
use serde::Serialize;

fn empty(text: &str) -> bool {
    text.is_empty()
}

/// A rule; what is not said is left out, as Incus does.
#[derive(Debug, Serialize)]
#[allow(missing_docs)]
pub struct RuleView<'a> {
    pub action: &'a str,
    #[serde(skip_serializing_if = "empty")]
    pub source: &'a str,
    #[serde(skip_serializing_if = "empty")]
    pub destination: &'a str,
    #[serde(skip_serializing_if = "empty")]
    pub protocol: &'a str,
    #[serde(skip_serializing_if = "empty")]
    pub source_port: &'a str,
    #[serde(skip_serializing_if = "empty")]
    pub destination_port: &'a str,
    #[serde(skip_serializing_if = "empty")]
    pub icmp_type: &'a str,
    #[serde(skip_serializing_if = "empty")]
    pub icmp_code: &'a str,
    #[serde(skip_serializing_if = "empty")]
    pub description: &'a str,
    pub state: &'a str,
}

impl<'a> From<&'a AclRule> for RuleView<'a> {
    fn from(r: &'a AclRule) -> Self {
        Self {
            action: &r.action,
            source: &r.source,
            destination: &r.destination,
            protocol: &r.protocol,
            source_port: &r.source_port,
            destination_port: &r.destination_port,
            icmp_type: &r.icmp_type,
            icmp_code: &r.icmp_code,
            description: &r.description,
            state: &r.state,
        }
    }
}

/// A network ACL.
#[derive(Debug, Serialize)]
#[allow(missing_docs)]
pub struct AclView<'a> {
    pub name: &'a str,
    pub description: &'a str,
    pub egress: Vec<RuleView<'a>>,
    pub ingress: Vec<RuleView<'a>>,
    pub config: &'a Config,
    pub used_by: Vec<String>,
    pub project: &'a str,
}

impl<'a> AclView<'a> {
    /// Of a record.
    pub fn of(acl: &'a NetworkAcl, used_by: Vec<String>, project: &'a str) -> Self {
        Self {
            name: &acl.name,
            description: &acl.description,
            egress: acl.egress.iter().map(RuleView::from).collect(),
            ingress: acl.ingress.iter().map(RuleView::from).collect(),
            config: &acl.config,
            used_by,
            project,
        }
    }
}

/// An address set.
#[derive(Debug, Serialize)]
#[allow(missing_docs)]
pub struct AddressSetView<'a> {
    pub name: &'a str,
    pub description: &'a str,
    pub addresses: &'a [String],
    pub config: &'a Config,
    pub used_by: Vec<String>,
    pub project: &'a str,
}

impl<'a> AddressSetView<'a> {
    /// Of a record.
    pub fn of(set: &'a AddressSet, used_by: Vec<String>, project: &'a str) -> Self {
        Self {
            name: &set.name,
            description: &set.description,
            addresses: &set.addresses,
            config: &set.config,
            used_by,
            project,
        }
    }
}

/// A forward.
#[derive(Debug, Serialize)]
#[allow(missing_docs)]
pub struct ForwardView<'a> {
    pub listen_address: String,
    pub description: &'a str,
    pub config: &'a Config,
    pub ports: &'a [ForwardPort],
    pub location: &'static str,
}

impl<'a> ForwardView<'a> {
    /// Of a record.
    pub fn of(forward: &'a NetworkForward) -> Self {
        Self {
            listen_address: forward.listen_address.to_string(),
            description: &forward.description,
            config: &forward.config,
            ports: &forward.ports,
            location: NOWHERE,
        }
    }
}
