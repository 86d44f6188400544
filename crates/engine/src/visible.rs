//! What a project sees of what all projects share: networks with their forwards, ACLs, address sets, pools. Who may not use a
//! network or pool does not see that it is there; of a forward nobody learns where it leads in another project.

use crate::{Engine, Records, Row, context::Context, firewall, tenancy::rules::ProjectRules};
use karst_model::{
    Error, Result,
    access::Permission,
    device::Devices,
    firewall::{AddressSet, NetworkAcl, NetworkForward},
    keys,
    network::Network,
    project::Project,
    storage::Pool,
};
use std::{collections::BTreeSet, net::IpAddr};

/// What was checked when it was written parses, unless a newer version wrote it: what that restricts is not known here.
pub(crate) fn rules(project: &Project) -> ProjectRules {
    let config = &project.config;
    ProjectRules::parse(config).unwrap_or_else(|_| {
        let on = config.get("restricted").is_some_and(|v| keys::parse_bool("restricted", v).unwrap_or(true));
        ProjectRules { limits: Default::default(), restricted: on.then(|| config.clone()) }
    })
}

impl Records {
    /// Whether a project may use a network, and so sees it.
    pub(crate) fn sees_network(&self, project: &Project, network: &Network) -> bool {
        let rules = rules(project);
        rules.restriction("restricted.devices.nic") != Some("block")
            && rules.lists("restricted.networks.access", &network.name)
    }

    /// Whether a project may use each of the networks that there are, or may be.
    fn sees_all_networks(project: &Project) -> bool {
        let rules = rules(project);
        rules.restriction("restricted.devices.nic") != Some("block")
            && rules.restriction("restricted.networks.access").is_none_or(|list| list.trim().is_empty())
    }

    /// An ACL of a network that a project does not see tells of guests there. Where a project sees some networks only, it
    /// sees the ACLs of those, and those that its own NICs name.
    pub(crate) fn sees_acl(&self, project: &Project, acl: &NetworkAcl) -> bool {
        if Self::sees_all_networks(project) {
            return true;
        }
        let names =
            |text: Option<&String>| text.is_some_and(|t| t.split(',').any(|w| w.trim() == &*acl.name));
        let nics = |devices: &Devices| {
            let mut nics = devices.values().filter(|keys| keys.get("type").is_some_and(|t| t == "nic"));
            nics.any(|keys| names(keys.get("security.acls")))
        };
        let home = self.home(project, "features.profiles");
        let mut networks = self.networks.values().filter(|n| self.sees_network(project, n));
        networks.any(|n| names(n.config.get("security.acls")))
            || self
                .profiles
                .values()
                .any(|p| p.project == project.id && home == project.id && nics(&p.devices))
            || self.instances.values().any(|i| i.project == project.id && nics(&self.expanded(i).1))
    }

    /// An address set is seen with the ACLs that name it.
    pub(crate) fn sees_address_set(&self, project: &Project, set: &AddressSet) -> bool {
        Self::sees_all_networks(project)
            || self
                .acls
                .values()
                .any(|acl| firewall::names_set(acl, &set.name) && self.sees_acl(project, acl))
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
