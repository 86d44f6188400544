//! Whose networks a project uses: its own (`features.networks=true`), or those of the default project; with them go ACLs and
//! address sets. Names are unique in the project that has them, interfaces on the whole host: the name of a bridge's interface is
//! claimed where the names of the default project's networks are, which have always been both.

use crate::{Engine, Records, Row, context::Context};
use karst_model::{
    Config, Error, Missing, ProjectId, Result,
    access::Permission,
    device::NicKind,
    firewall::{AddressSet, NetworkAcl},
    network::Network,
    project::{DEFAULT_PROJECT, Project},
    uplink::NetworkKind,
};
use std::collections::BTreeSet;

/// The feature that says it.
pub(crate) const FEATURE: &str = "features.networks";

/// What whoever may change a project may say of its bridges. All else reaches beyond them: interfaces of the host become ports,
/// destinations are routed, addresses are the host's, lines go to its programs.
const OF_TENANTS: &[&str] = &[
    "bridge.driver",
    "bridge.mtu",
    "dns.domain",
    "dns.hosts",
    "dns.local",
    "dns.mode",
    "dns.nameservers",
    "dns.plain",
    "dns.search",
    "dns.srv",
    "dns.txt",
    "ipv4.dhcp",
    "ipv4.dhcp.expiry",
    "ipv4.dhcp.gateway",
    "ipv4.dhcp.hosts",
    "ipv4.dhcp.ranges",
    "ipv4.dhcp.routes",
    "ipv4.firewall",
    "ipv4.nat",
    "ipv4.routing",
    "ipv6.dhcp",
    "ipv6.dhcp.expiry",
    "ipv6.dhcp.ranges",
    "ipv6.dhcp.stateful",
    "ipv6.firewall",
    "ipv6.nat",
    "ipv6.ra",
    "ipv6.routing",
];

/// What a NIC is on, as its device says it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Place {
    /// A network of the instance's project, by name.
    Network(String),
    /// A bridge on the host, which may be a network's.
    Interface(String),
}

impl Place {
    pub(crate) fn of(kind: &NicKind) -> Option<Self> {
        match kind {
            NicKind::Network { network } => Some(Self::Network(network.clone())),
            NicKind::Bridged { parent } => Some(Self::Interface(parent.clone())),
            _ => None,
        }
    }

    /// Is it this network, out of those that the instance's project uses?
    pub(crate) fn is(&self, network: &Network) -> bool {
        match self {
            Self::Network(name) => **name == *network.name,
            Self::Interface(name) => network.kind == NetworkKind::Bridge && *name == network.interface(),
        }
    }
}

impl Records {
    /// The project whose networks, ACLs and address sets a project uses.
    pub fn network_home(&self, project: ProjectId) -> ProjectId {
        self.projects.get(&project).map_or(project, |row| self.home(row, FEATURE))
    }

    /// The projects that use the networks of `home`.
    pub(crate) fn network_users(&self, home: ProjectId) -> BTreeSet<ProjectId> {
        self.projects.keys().copied().filter(|id| self.network_home(*id) == home).collect()
    }

    fn is_default(&self, project: ProjectId) -> bool {
        self.project(DEFAULT_PROJECT).is_ok_and(|p| p.id == project)
    }

    /// The project that a network, ACL or address set is the own of, where it is not one of those that projects share.
    pub(crate) fn owner_of(&self, home: ProjectId) -> Option<ProjectId> {
        (!self.is_default(home)).then_some(home)
    }

    /// Where the names of a project's networks, ACLs and address sets are unique.
    pub(crate) fn network_scope(&self, home: ProjectId) -> String {
        self.owner_of(home).map(|p| p.to_string()).unwrap_or_default()
    }

    /// The names that a network has: scope and name.
    pub(crate) fn network_names(&self, network: &Network) -> Vec<(String, String)> {
        let mut names = vec![(self.network_scope(network.project), network.name.to_string())];
        let apart = network.interface.as_ref().is_some_and(|i| **i != *network.name);
        if (apart || self.owner_of(network.project).is_some()) && network.kind == NetworkKind::Bridge {
            names.push((String::new(), network.interface().to_owned()));
        }
        names
    }

    /// Network by name, out of those that a project uses.
    pub fn network(&self, project: ProjectId, name: &str) -> Result<&Row<Network>> {
        let home = self.network_home(project);
        let missing = || Error::missing(Missing::Network, format!("network {name:?} not found"));
        self.networks.values().find(|n| n.project == home && &*n.name == name).ok_or_else(missing)
    }

    /// Network ACL by name, out of those that a project uses.
    pub fn acl(&self, project: ProjectId, name: &str) -> Result<&Row<NetworkAcl>> {
        let home = self.network_home(project);
        let found = self.acls.values().find(|a| a.project == home && &*a.name == name);
        found.ok_or_else(|| crate::visible::no_acl(name))
    }

    /// Address set by name, out of those that a project uses.
    pub fn address_set(&self, project: ProjectId, name: &str) -> Result<&Row<AddressSet>> {
        let home = self.network_home(project);
        let found = self.address_sets.values().find(|s| s.project == home && &*s.name == name);
        found.ok_or_else(|| Error::not_found(format!("address set {name:?} not found")))
    }

    /// The network whose bridge on the host this is.
    pub(crate) fn network_on(&self, interface: &str) -> Option<&Row<Network>> {
        self.networks.values().find(|n| n.kind == NetworkKind::Bridge && n.interface() == interface)
    }

    /// The network whose bridge a NIC of a project names as an interface of the host; none where it is the host's own.
    ///
    /// # Errors
    /// Forbidden for the bridge of a network that the project does not use.
    pub(crate) fn network_by_bridge(
        &self,
        project: ProjectId,
        interface: &str,
    ) -> Result<Option<&Row<Network>>> {
        match self.network_on(interface) {
            Some(row) if row.project != self.network_home(project) => {
                Err(Error::forbidden(format!("{interface:?} is no bridge that this project may use")))
            }
            found => Ok(found),
        }
    }

    /// The network that a NIC of a project is on.
    pub(crate) fn network_at(&self, project: ProjectId, place: &Place) -> Option<&Row<Network>> {
        match place {
            Place::Network(name) => self.network(project, name).ok(),
            Place::Interface(name) => self.network_by_bridge(project, name).ok().flatten(),
        }
    }

    /// Path in the API of something that has a name in a project; `kind` is `networks`, `network-acls`, ….
    pub(crate) fn path_in(&self, kind: &str, name: &str, project: ProjectId) -> String {
        match self.projects.get(&project).map(|p| &*p.name) {
            None | Some(DEFAULT_PROJECT) => format!("/1.0/{kind}/{name}"),
            Some(project) => format!("/1.0/{kind}/{name}?project={project}"),
        }
    }
}

impl Engine {
    /// The project whose networks, ACLs and address sets a request changes. Those that projects share belong to the whole host, so
    /// only who may edit the default project may change them.
    ///
    /// # Errors
    /// Not found, forbidden.
    pub(crate) fn network_project(&self, context: &Context, project: &str) -> Result<Row<Project>> {
        let named = self.project(context, project, Permission::ProjectView)?;
        let home = {
            let records = self.inner().inventory.read();
            records.projects.get(&records.network_home(named.id)).cloned().unwrap_or_else(|| named.clone())
        };
        if home.id == named.id && *home.name != *DEFAULT_PROJECT {
            context.demand(Permission::ResourceEdit, &home)?;
        } else if !context.principal().may(Permission::ResourceEdit, Some(home.id)) {
            return Err(Error::forbidden(
                "networks belong to the default project; changing them needs the permission \"resource_edit\" there",
            ));
        }
        Ok(home)
    }

    /// As [`Self::network_project`], for what takes addresses of the host itself.
    ///
    /// # Errors
    /// Not found, forbidden.
    pub(crate) fn forward_project(&self, context: &Context, project: &str) -> Result<Row<Project>> {
        let home = self.network_project(context, project)?;
        match self.edits_the_hosts(context) {
            true => Ok(home),
            false => Err(Error::forbidden(
                "a forward takes an address of the host; that needs the permission \"resource_edit\" in the default project",
            )),
        }
    }

    /// May `context` say of networks what reaches into the host?
    pub(crate) fn edits_the_hosts(&self, context: &Context) -> bool {
        let records = self.inner().inventory.read();
        let default = records.project(DEFAULT_PROJECT).ok().map(|p| p.id);
        default.is_some_and(|id| context.principal().may(Permission::ResourceEdit, Some(id)))
    }
}

/// What a project says of a network of its own ends at its bridge, unless an administrator of the host's networks (`whole`) says
/// it. `before`: what is there, which may stay.
///
/// # Errors
/// Forbidden, naming the key.
pub(crate) fn demand_reach(
    whole: bool,
    kind: NetworkKind,
    config: &Config,
    before: Option<&Config>,
) -> Result<()> {
    if whole {
        return Ok(());
    }
    let needs = "needs the permission \"resource_edit\" in the default project";
    if kind != NetworkKind::Bridge {
        let text = format!("a network of type {} is an interface of the host, which {needs}", kind.as_str());
        return Err(Error::forbidden(text).at("type"));
    }
    let own = |key: &str| {
        OF_TENANTS.contains(&key)
            || ["user.", "security.acls", "limits.", "portgroup."].iter().any(|p| key.starts_with(p))
    };
    let is_address = |key: &str| matches!(key, "ipv4.address" | "ipv6.address");
    for (key, value) in config {
        let same = before.and_then(|b| b.get(key)).is_some_and(|was| was == value);
        let chosen = is_address(key) && matches!(value.as_str(), "" | "auto" | "none");
        if same || chosen || own(key) {
            continue;
        }
        let text = match is_address(key) {
            true => {
                format!("a subnet of one's own choice {needs}; leave {key} out, and a free one is chosen")
            }
            false => format!("{key} reaches into the host, which {needs}; leave it out"),
        };
        return Err(Error::forbidden(text).at(format!("config.{key}")));
    }
    // What was said by somebody who may say it does not go away by who may not.
    let mut gone = before.into_iter().flatten().map(|(key, _)| key.as_str());
    match gone.find(|key| !config.contains_key(*key) && !own(key) && !is_address(key)) {
        None => Ok(()),
        Some(key) => Err(Error::forbidden(format!("to take {key} away {needs}; say it as it is"))
            .at(format!("config.{key}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_of_tenants_are_keys_of_bridges() {
        for key in OF_TENANTS {
            let known = karst_model::network::BRIDGE_KEYS.iter().any(|(k, _)| k == key);
            assert!(known, "{key}");
        }
        for beyond in [
            "raw.dnsmasq",
            "dns.forwarders",
            "bridge.external_interfaces",
            "ipv4.routes",
            "ipv6.routes",
            "ipv4.nat.address",
        ] {
            assert!(!OF_TENANTS.contains(&beyond), "{beyond}");
        }
    }

    #[test]
    fn a_project_says_of_its_bridges_what_ends_there() {
        let of = |pairs: &[(&str, &str)]| -> Config {
            pairs.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect()
        };
        let field = |new: &[(&str, &str)], before: Option<&[(&str, &str)]>| {
            let before = before.map(of);
            let said = demand_reach(false, NetworkKind::Bridge, &of(new), before.as_ref());
            said.err().and_then(|e| e.field)
        };
        let fine = [("ipv4.address", "auto"), ("ipv6.address", "none"), ("dns.domain", "x"), ("user.a", "b")];
        assert_eq!(field(&fine, None), None);
        for (key, value) in [
            ("ipv4.address", "10.1.2.1/24"),
            ("ipv4.routes", "192.0.2.0/24"),
            ("bridge.external_interfaces", "eth1"),
            ("raw.dnsmasq", "x"),
            ("ipv4.nat.address", "192.0.2.1"),
        ] {
            let wanted = Some(format!("config.{key}"));
            assert_eq!(field(&[(key, value)], None), wanted);
            assert_eq!(field(&[(key, value)], Some(&[(key, "other")])), wanted);
            assert_eq!(field(&[(key, value)], Some(&[(key, value)])), None, "it stays");
            assert!(demand_reach(true, NetworkKind::Bridge, &of(&[(key, value)]), None).is_ok());
        }
        let routed = [("ipv4.routes", "192.0.2.0/24"), ("ipv4.address", "10.1.2.1/24"), ("dns.domain", "x")];
        assert_eq!(field(&[], Some(&routed)), Some("config.ipv4.routes".into()));
        assert_eq!(field(&routed[..1], Some(&routed)), None, "without an address and a domain");
        let uplink = demand_reach(false, NetworkKind::Macvlan, &of(&[("parent", "eth1")]), None);
        assert_eq!(uplink.unwrap_err().field.as_deref(), Some("type"));
    }
}
