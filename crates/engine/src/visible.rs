//! What a project sees of what all projects share: networks with their forwards, ACLs, address sets, pools. Who may not use a
//! network or pool does not see that it is there; of a forward nobody learns where it leads in another project.

use crate::{Engine, Records, Row, context::Context, firewall, tenancy::rules::ProjectRules};
use karst_model::{
    Error, Result, access::Permission, device::Devices, firewall::NetworkForward, keys, network::Network,
    project::Project, spec::PortSpec, storage::Pool,
};
use std::{collections::BTreeSet, net::IpAddr};

/// What was checked when it was written parses, unless a newer version wrote it: what that restricts is not known here.
pub(crate) fn rules(project: &Project) -> ProjectRules {
    let config = &project.config;
    ProjectRules::parse(config).unwrap_or_else(|_| {
        let on = config.get("restricted").is_some_and(|v| keys::parse_bool("restricted", v).unwrap_or(true));
        ProjectRules { restricted: on.then(|| config.clone()), ..Default::default() }
    })
}

/// Puts on what a port has in a project whatever its NIC says ([`ProjectRules::filters`]).
pub(crate) fn put_filters(port: &mut PortSpec, filters: &[&str]) {
    port.mac_filter |= filters.contains(&"security.mac_filtering");
    port.ipv4_filter |= filters.contains(&"security.ipv4_filtering");
    port.ipv6_filter |= filters.contains(&"security.ipv6_filtering");
}

/// What a project sees of things with names.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Seen {
    All,
    Only(BTreeSet<String>),
}

impl Seen {
    pub(crate) fn has(&self, name: &str) -> bool {
        match self {
            Self::All => true,
            Self::Only(names) => names.contains(name),
        }
    }
}

impl Records {
    /// Whether a project may use a network, and so sees it.
    pub(crate) fn sees_network(&self, project: &Project, network: &Network) -> bool {
        let rules = rules(project);
        self.network_home(project.id) == network.project
            && rules.restriction("restricted.devices.nic") != Some("block")
            && rules.lists("restricted.networks.access", &network.name)
    }

    /// Whether a project may use each of the networks that there are, or may be.
    fn sees_all_networks(project: &Project) -> bool {
        let rules = rules(project);
        rules.restriction("restricted.devices.nic") != Some("block")
            && rules.restriction("restricted.networks.access").is_none_or(|list| list.trim().is_empty())
    }

    /// The ACLs that a project sees. One of a network that it does not see tells of guests there: where it sees some networks
    /// only, it sees the ACLs of those, and those that its own NICs name.
    pub(crate) fn seen_acls(&self, project: &Project) -> Seen {
        // Its own it sees, whatever it may use.
        if Self::sees_all_networks(project) || self.owner_of(self.network_home(project.id)).is_some() {
            return Seen::All;
        }
        let mut seen = BTreeSet::new();
        let mut add = |text: Option<&String>| {
            let names = text.into_iter().flat_map(|t| t.split(','));
            seen.extend(names.map(|name| name.trim().to_owned()));
        };
        for network in self.networks.values().filter(|n| self.sees_network(project, n)) {
            add(network.config.get("security.acls"));
        }
        let mut of_nics = |devices: &Devices| {
            let nics = devices.values().filter(|keys| keys.get("type").is_some_and(|t| t == "nic"));
            nics.for_each(|keys| add(keys.get("security.acls")));
        };
        if self.home(project, "features.profiles") == project.id {
            let own = self.profiles.values().filter(|p| p.project == project.id);
            own.for_each(|p| of_nics(&p.devices));
        }
        for instance in self.instances.values().filter(|i| i.project == project.id) {
            of_nics(&self.devices_in_use(instance));
        }
        Seen::Only(seen)
    }

    /// Whoever writes the name of an ACL into a NIC has to see that ACL: else its name alone would show it to him. One that he does
    /// not see is as one that is not there.
    ///
    /// # Errors
    /// Not found, naming the key.
    pub(crate) fn demand_seen_acls(
        &self,
        context: &Context,
        project: &Project,
        devices: &Devices,
    ) -> Result<()> {
        let mut seen = None;
        for (device, keys) in devices.iter().filter(|(_, keys)| keys.get("type").is_some_and(|t| t == "nic"))
        {
            let named = keys.get("security.acls").into_iter().flat_map(|text| text.split(',')).map(str::trim);
            for name in named.filter(|name| !name.is_empty()) {
                let at = |e: Error| e.at(format!("devices.{device}.security.acls"));
                let acl = self.acl(project.id, name).map_err(at)?;
                if !context.principal().may(Permission::ProjectView, Some(acl.project))
                    && !seen.get_or_insert_with(|| self.seen_acls(project)).has(name)
                {
                    return Err(at(no_acl(name)));
                }
            }
        }
        Ok(())
    }

    /// The address sets that a project sees: those that the ACLs that it sees name.
    pub(crate) fn seen_address_sets(&self, project: &Project) -> Seen {
        let acls = self.seen_acls(project);
        if acls == Seen::All {
            return Seen::All;
        }
        let home = self.network_home(project.id);
        let seen = self.acls.values().filter(|acl| acl.project == home && acls.has(&acl.name));
        Seen::Only(seen.flat_map(|acl| firewall::sets_of(acl)).collect())
    }

    /// Whether one of the projects that `context` sees may use a pool. Who sees no project is no tenant.
    pub(crate) fn sees_pool(&self, context: &Context, pool: &Pool) -> bool {
        let may = |permission, project| context.principal().may(permission, project);
        if may(Permission::ServerInspect, None) {
            return true;
        }
        let mut projects =
            self.projects.values().filter(|p| may(Permission::ProjectView, Some(p.id))).peekable();
        let none = projects.peek().is_none();
        none || projects.any(|p| {
            let rules = rules(p);
            rules.lists("restricted.storage-pools.access", &pool.name)
                && rules.limits.pools.get(&*pool.name) != Some(&0)
        })
    }
}

impl Engine {
    /// Forwards of a network as `context` may see them. Whoever sees the project of the network sees them whole; anybody else is
    /// told of targets that are guests which he sees.
    pub(crate) async fn show_forwards(
        &self,
        context: &Context,
        project: &str,
        network: &Network,
        forwards: Vec<Row<NetworkForward>>,
    ) -> Result<Vec<Row<NetworkForward>>> {
        let whole = context.principal().may(Permission::ProjectView, Some(network.project));
        if whole || forwards.is_empty() {
            return Ok(forwards);
        }
        let known: BTreeSet<IpAddr> = match self.network_leases(context, project, &network.name).await {
            Ok(leases) => leases.into_iter().map(|l| l.address).collect(),
            // Without the host nobody knows whose they are.
            Err(e) if e.is(karst_model::ErrorKind::Unavailable) => BTreeSet::new(),
            Err(e) => return Err(e),
        };
        let shown = |text: &str| text.parse::<IpAddr>().is_ok_and(|address| known.contains(&address));
        let conceal = |row: Row<NetworkForward>| {
            let mut forward = row.value.clone();
            forward.config.retain(|key, value| key != "target_address" || shown(value));
            let other = forward.config.contains_key("target_address");
            for port in &mut forward.ports {
                let seen = if port.target_address.is_empty() { other } else { shown(&port.target_address) };
                if !seen {
                    port.target_address.clear();
                    port.target_port.clear();
                }
            }
            Row::new(row.stored().with(forward))
        };
        Ok(forwards.into_iter().map(conceal).collect())
    }
}

/// As of what is nowhere.
pub(crate) fn no_network(name: &str) -> Error {
    Error::not_found(format!("network {name:?} not found"))
}

/// As of what is nowhere.
pub(crate) fn no_acl(name: &str) -> Error {
    Error::not_found(format!("network ACL {name:?} not found"))
}
