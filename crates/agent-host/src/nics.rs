//! NICs that name something of the host: what its policy must grant, and what must be so before anything is made.

use crate::{HostPolicy, RealAgent, policy::FILE};
use ipnet::IpNet;
use karst_agent::{Neighbour, NeighboursFind, NetworkState, names::check_host_interface};
use karst_guest::ResolvedLink;
use karst_host::{link, nic::filters_vlans};
use karst_model::{
    Error, InstanceId, NetworkId, Result,
    device::{ParentLink, interface_name},
    spec::{GuestSpec, NetworkHost, NicLink, NicSpec, PortSpec},
};
use karst_network::LoosePort;
use std::{collections::BTreeMap, net::IpAddr};

/// Interfaces of the host that a guest has for itself.
pub(crate) fn lent(spec: &GuestSpec) -> Vec<String> {
    let of = |n: &NicSpec| match &n.link {
        NicLink::Physical(ParentLink { parent, vlan: None, .. }) => Some(parent.clone()),
        _ => None,
    };
    spec.nics.iter().filter_map(of).collect()
}

/// What the host's kernel knows of these neighbours.
pub(crate) fn neighbours(find: &NeighboursFind) -> Result<Vec<Neighbour>> {
    let wanted: Vec<String> = find.macs.iter().map(|m| m.to_ascii_lowercase()).collect();
    let known = karst_host::neighbours::all()?.into_iter().filter(|n| wanted.contains(&n.mac));
    Ok(known.map(|n| Neighbour { mac: n.mac, address: n.address }).collect())
}

/// Things of this machine in place of ids.
pub(crate) fn resolve(link: NicLink, networks: &BTreeMap<NetworkId, String>) -> Result<ResolvedLink> {
    Ok(match link {
        NicLink::Network(id) => ResolvedLink::Bridge(
            networks
                .get(&id)
                .cloned()
                .ok_or_else(|| Error::not_found(format!("network {id} is not on this host")))?,
        ),
        NicLink::Bridge(name) => ResolvedLink::Bridge(name),
        NicLink::Macvlan(parent) => ResolvedLink::Macvlan(parent),
        NicLink::Physical(parent) => ResolvedLink::Physical(parent),
        NicLink::PointToPoint(routes) => ResolvedLink::PointToPoint(routes),
        NicLink::Routed { link, routes } => ResolvedLink::Routed { link, routes },
        NicLink::User {} => ResolvedLink::User {},
    })
}

/// What the network driver must know of a guest's ports on no network.
pub(crate) fn loose(spec: &GuestSpec) -> Vec<LoosePort> {
    let of = |n: &NicSpec| {
        let (cable, sources) = match &n.link {
            NicLink::Bridge(_) => (false, None),
            NicLink::PointToPoint(_) => (true, None),
            NicLink::Routed { link, routes } => {
                let own = link.addresses.iter().map(|a| IpNet::from(*a));
                (true, Some(own.chain(routes.iter().copied()).collect()))
            }
            _ => return None,
        };
        let port = n.port.clone().unwrap_or_default();
        let port = PortSpec { interface: n.host_interface.clone(), ..port };
        if sources.is_none() && n.port.is_none() {
            return None;
        }
        let host = NetworkHost {
            mac: n.mac.clone(),
            ipv4: n.ipv4,
            ipv6: n.ipv6,
            port: Some(port),
            ..NetworkHost::default()
        };
        Some(LoosePort { host, cable, sources })
    };
    spec.nics.iter().filter_map(of).collect()
}

impl HostPolicy {
    /// May networks and guests have this interface?
    ///
    /// # Errors
    /// Invalid, forbidden.
    pub fn check_interface(&self, name: &str) -> Result<()> {
        interface_name("parent", name)?;
        if name != "lo" && self.network_interfaces.iter().any(|n| n == name || n == "*") {
            return Ok(());
        }
        Err(Error::forbidden(format!(
            "this host's policy does not grant the interface {name:?}; its administrator can, by network_interfaces in {FILE}"
        )))
    }

    /// May the host route this to a guest?
    ///
    /// # Errors
    /// Forbidden.
    pub fn check_route(&self, net: IpNet) -> Result<()> {
        if self.routed_subnets.iter().any(|granted| granted.contains(&net)) {
            return Ok(());
        }
        Err(Error::forbidden(format!(
            "this host's policy does not grant that it routes {net} to a guest; its administrator can, by routed_subnets in \
             {FILE}"
        )))
    }
}

impl RealAgent {
    /// Everything of NICs that can be wrong before anything is made of them.
    pub(crate) async fn check_nics(
        &self,
        spec: &GuestSpec,
        networks: &BTreeMap<NetworkId, String>,
    ) -> Result<()> {
        for nic in &spec.nics {
            check_host_interface(Some(&self.options.daemon_id), &nic.host_interface)?;
            self.check_link(spec.instance, nic, networks).await?;
            let other = self
                .all_guests()
                .into_iter()
                .any(|(id, record)| id != spec.instance && record.interfaces.contains(&nic.host_interface));
            if other {
                return Err(Error::conflict(format!(
                    "interface {:?} is another guest's",
                    nic.host_interface
                )));
            }
        }
        Ok(())
    }

    async fn check_link(
        &self,
        instance: InstanceId,
        nic: &NicSpec,
        networks: &BTreeMap<NetworkId, String>,
    ) -> Result<()> {
        let policy = self.policy();
        let field = |key: &str| format!("devices.{}.{key}", nic.name);
        let granted = |name: &str| policy.check_interface(name).map_err(|e| e.at(field("parent")));
        let routed = |key: &str, nets: Vec<IpNet>| {
            nets.into_iter().try_for_each(|n| {
                let family = if n.addr().is_ipv4() { "ipv4" } else { "ipv6" };
                policy.check_route(n).map_err(|e| e.at(field(&format!("{family}.{key}"))))
            })
        };
        let there = |name: &str| {
            link::get(name)?.ok_or_else(|| {
                Error::not_found(format!("this host has no interface {name:?}")).at(field("parent"))
            })
        };
        let bridge = match &nic.link {
            NicLink::Network(id) => {
                let bridge = networks.get(id);
                bridge.ok_or_else(|| Error::not_found(format!("network {id} is not on this host")))?
            }
            NicLink::Bridge(name) => {
                granted(name)?;
                let found = there(name)?;
                if found.kind.as_deref() != Some("bridge") {
                    return Err(Error::invalid(
                        field("parent"),
                        format!(
                            "{name:?} is no bridge; take nictype=macvlan for an interface, or put it into a bridge"
                        ),
                    ));
                }
                if found.alias.as_deref().is_some_and(|a| a.starts_with("karst:")) {
                    return Err(Error::conflict(format!(
                        "{name:?} is the bridge of a network of Karst; name that by network"
                    ))
                    .at(field("parent")));
                }
                name
            }
            NicLink::Macvlan(parent) => {
                granted(&parent.parent)?;
                return there(&parent.parent).map(drop);
            }
            NicLink::Physical(parent) => {
                granted(&parent.parent)?;
                return self
                    .check_lendable(instance, &parent.parent, parent.vlan)
                    .await
                    .map_err(|e| e.at(field("parent")));
            }
            NicLink::PointToPoint(routes) => return routed("routes", routes.clone()),
            NicLink::User {} if policy.user_networking => return Ok(()),
            NicLink::User {} => {
                return Err(Error::forbidden(format!(
                    "this host lets no machine out as itself; its administrator can, by user_networking in {FILE}"
                ))
                .at(field("nictype")));
            }
            NicLink::Routed { link, routes } => {
                if let Some(parent) = &link.parent {
                    granted(&parent.parent)?;
                    there(&parent.parent)?;
                }
                routed("address", link.addresses.iter().map(|a| IpNet::from(*a)).collect())?;
                routed("routes", routes.clone())?;
                let hosts = [IpAddr::V4(link.host.0), IpAddr::V6(link.host.1)];
                let local = |a: &IpAddr| match a {
                    IpAddr::V4(a) => a.is_link_local(),
                    IpAddr::V6(a) => a.is_unicast_link_local(),
                };
                // An address beyond the link would become the host's own.
                return routed(
                    "host_address",
                    hosts.into_iter().filter(|a| !local(a)).map(IpNet::from).collect(),
                );
            }
        };
        if !nic.vlans.is_empty() && !filters_vlans(bridge)? {
            let key = if nic.vlans.untagged.is_some() || nic.vlans.closed { "vlan" } else { "vlan.tagged" };
            return Err(Error::unsupported(format!(
                "the bridge {bridge:?} does not tell VLANs apart; its host switches that on (ip link set {bridge} type bridge \
                 vlan_filtering 1), where the kernel has it"
            ))
            .at(field(key)));
        }
        Ok(())
    }

    /// An interface that leaves the host takes its addresses along: none must depend on it.
    async fn check_lendable(&self, instance: InstanceId, name: &str, vlan: Option<u16>) -> Result<()> {
        if vlan.is_none() {
            for (id, record) in self.all_guests() {
                if !record.lent.iter().any(|l| l == name) {
                    continue;
                }
                if id == instance && link::get(name)?.is_none() {
                    // It has it.
                    return Ok(());
                }
                if id != instance && self.runs(id).await? {
                    return Err(Error::conflict(format!(
                        "instance {id} has the interface {name:?}; stop that first"
                    )));
                }
            }
        }
        let found = link::get(name)?
            .ok_or_else(|| Error::not_found(format!("this host has no interface {name:?}")))?;
        if vlan.is_some() {
            return Ok(());
        }
        if found.master.is_some() {
            return Err(Error::conflict(format!("the interface {name:?} is in a bridge; take it out first")));
        }
        if link::addresses(Some(found.index))?.iter().any(|a| a.scope == 0) {
            return Err(Error::conflict(format!(
                "the interface {name:?} has addresses of the host's own, which would stop working; remove them first"
            )));
        }
        Ok(())
    }

    /// State of an interface of the host that is granted.
    pub(crate) async fn link_state_of(&self, name: &str) -> Result<NetworkState> {
        self.policy().check_interface(name)?;
        let Some(found) = link::get(name)? else {
            for (id, record) in self.all_guests() {
                if record.lent.iter().any(|l| l == name) && self.runs(id).await? {
                    return Err(Error::conflict(format!("instance {id} has the interface {name:?} now")));
                }
            }
            return Err(Error::not_found(format!("this host has no interface {name:?}")).at("parent"));
        };
        let addresses = link::addresses(Some(found.index))?;
        let above = link::list()?.into_iter().filter(|l| l.master == Some(found.index));
        Ok(NetworkState {
            mac: found.mac.unwrap_or_default(),
            mtu: found.mtu,
            up: found.up,
            addresses: addresses.iter().map(|a| (a.address, a.prefix, a.scope_name().to_owned())).collect(),
            counters: found.counters,
            ports: above.map(|l| l.name).collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_names_the_host_is_granted() {
        let policy = HostPolicy {
            network_interfaces: vec!["eth1".into()],
            routed_subnets: vec!["192.0.2.0/24".parse().unwrap()],
            ..HostPolicy::default()
        };
        policy.check_interface("eth1").unwrap();
        let e = policy.check_interface("eth0").unwrap_err();
        assert!(e.message.contains("network_interfaces"), "{e}");
        assert!(policy.check_interface("../x").is_err());
        let all = HostPolicy { network_interfaces: vec!["*".into()], ..HostPolicy::default() };
        all.check_interface("eth7").unwrap();
        assert!(all.check_interface("lo").is_err());
        policy.check_route("192.0.2.7/32".parse().unwrap()).unwrap();
        assert!(
            policy
                .check_route("192.0.0.0/16".parse().unwrap())
                .unwrap_err()
                .message
                .contains("routed_subnets")
        );
        assert!(HostPolicy::default().check_route("10.0.0.1/32".parse().unwrap()).is_err());
    }
}
