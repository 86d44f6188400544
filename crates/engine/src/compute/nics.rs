//! What NICs are attached to: from their kind and the networks to what a host gets. Pure.

use super::expand::Lookups;
use crate::{Records, Row, tenancy::rules::SPOOFING, visible::put_filters};
use karst_model::{
    Error, Missing, ProjectId, Result,
    device::{NicDevice, NicKind, ParentLink},
    instance::InstanceKind,
    network::Network,
    spec::{NicLink, PortSpec},
    uplink::{NetworkForm, NetworkKind},
};

/// The network that a NIC of a project's instance is on; none for one that is on something of the host.
///
/// # Errors
/// Not found, and forbidden for another project's bridge, naming the key.
pub(crate) fn network_of<'a, 'n>(
    records: &'a Records,
    project: ProjectId,
    device: &str,
    nic: &'n NicDevice,
) -> Result<Option<(&'n str, &'a Row<Network>)>> {
    let at = |e: Error, key: &str| e.at(format!("devices.{device}.{key}"));
    match &nic.kind {
        NicKind::Network { network } => {
            let row = records.network(project, network).map_err(|e| at(e, "network"))?;
            Ok(Some((network, row)))
        }
        NicKind::Bridged { parent } => {
            let row = records.network_by_bridge(project, parent).map_err(|e| at(e, "parent"))?;
            match row {
                None => demand_no_lease(device, nic, parent).map(|()| None),
                Some(row) => Ok(Some((parent, row))),
            }
        }
        _ => Ok(None),
    }
}

/// No DHCP of ours serves a bridge of the host.
pub(crate) fn demand_no_lease(device: &str, nic: &NicDevice, parent: &str) -> Result<()> {
    if nic.port.group.is_some() {
        let text = format!(
            "groups of ports are of networks of this platform, and {parent:?} is a bridge of the host"
        );
        return Err(Error::invalid(format!("devices.{device}.portgroup"), text));
    }
    let filters = nic.port.ipv4_filter || nic.port.ipv6_filter;
    let keys = [("ipv4.address", nic.ipv4.is_some()), ("ipv6.address", nic.ipv6.is_some())];
    if let Some((key, _)) = keys.iter().find(|(_, set)| *set && !filters) {
        return Err(Error::invalid(
            format!("devices.{device}.{key}"),
            format!(
                "{parent:?} is a bridge of the host, where no address is given out; set it inside the guest"
            ),
        ));
    }
    for (filter, address, key) in [
        (nic.port.ipv4_filter, nic.ipv4.is_some(), "ipv4"),
        (nic.port.ipv6_filter, nic.ipv6.is_some(), "ipv6"),
    ] {
        if filter && !address {
            return Err(Error::invalid(
                format!("devices.{device}.security.{key}_filtering"),
                format!(
                    "on a bridge of the host the filter needs {key}.address: nothing else tells which is the guest's"
                ),
            ));
        }
    }
    if !nic.routes.is_empty() {
        return Err(Error::invalid(
            format!("devices.{device}.ipv4.routes"),
            format!("routes lead over networks of this platform, and {parent:?} is a bridge of the host"),
        ));
    }
    Ok(())
}

/// Keys of bridges' ports are of no use on an interface of the host.
pub(crate) fn demand_plain(device: &str, nic: &NicDevice, kind: NetworkKind) -> Result<()> {
    let wrong = [
        ("portgroup", nic.port.group.is_some()),
        ("ipv4.address", nic.ipv4.is_some()),
        ("ipv6.address", nic.ipv6.is_some()),
        ("ipv4.routes", !nic.routes.is_empty()),
        ("security.acls", nic.port.policy.is_some()),
        ("limits.ingress", nic.port != PortSpec::default()),
        ("vlan", !nic.vlans.is_empty()),
        ("host_name", nic.host_name.is_some()),
        ("queue.tx.length", nic.queue_length.is_some()),
    ];
    match wrong.iter().find(|(_, set)| *set) {
        None => Ok(()),
        Some((key, _)) => Err(Error::invalid(
            format!("devices.{device}.{key}"),
            format!("keys of a bridge's port do not apply on a network of type {}", kind.as_str()),
        )),
    }
}

/// What a host gets, and the MTU of the network where that says one.
pub(super) fn link(
    name: &str,
    nic: &NicDevice,
    kind: InstanceKind,
    lookups: &Lookups<'_>,
) -> Result<(NicLink, Option<u32>)> {
    let uplink = |kind: NetworkKind, link: ParentLink| match kind {
        NetworkKind::Physical => NicLink::Physical(link),
        NetworkKind::HostBridge => NicLink::Bridge(link.parent),
        _ => NicLink::Macvlan(link),
    };
    let (link, mtu) = match &nic.kind {
        NicKind::Network { network } => {
            let found = (lookups.network)(network).ok_or_else(|| {
                let text = format!("network {network:?} of device {name:?} not found");
                Error::missing(Missing::Network, text).at(format!("devices.{name}.network"))
            })?;
            match found.kind {
                NetworkKind::Bridge => (NicLink::Network(found.id), None),
                _ => match found.form()? {
                    NetworkForm::Bridge(_) => (NicLink::Network(found.id), None),
                    NetworkForm::Uplink(spec) => (uplink(spec.kind, spec.link), spec.mtu),
                },
            }
        }
        NicKind::Bridged { parent } => {
            let managed = (lookups.bridge)(parent).map_err(|e| e.at(format!("devices.{name}.parent")))?;
            (managed.map_or_else(|| NicLink::Bridge(parent.clone()), |n| NicLink::Network(n.id)), None)
        }
        NicKind::Macvlan(link) => (NicLink::Macvlan(link.clone()), None),
        NicKind::Physical(link) => (NicLink::Physical(link.clone()), None),
        NicKind::PointToPoint => (NicLink::PointToPoint(nic.routes.clone()), None),
        NicKind::User => (NicLink::User {}, None),
        NicKind::Routed(link) => (NicLink::Routed { link: link.clone(), routes: nic.routes.clone() }, None),
    };
    if let (NicLink::User {}, InstanceKind::Container) = (&link, kind) {
        let text =
            "a container has no QEMU that would reach a network for it; use bridged, macvlan, p2p or routed";
        return Err(Error::unsupported(text).at(format!("devices.{name}.nictype")));
    }
    if kind == InstanceKind::Container && nic.options != Default::default() {
        let text = "options are of NICs of virtual machines";
        return Err(Error::unsupported(text).at(format!("devices.{name}.io.options")));
    }
    let wrong = match (&link, kind) {
        (NicLink::Network(_) | NicLink::Bridge(_) | NicLink::Macvlan(_) | NicLink::User {}, _) => None,
        (_, InstanceKind::Container) => None,
        (NicLink::Physical(_), _) => Some("physical"),
        (NicLink::PointToPoint(_), _) => Some("p2p"),
        (NicLink::Routed { .. }, _) => Some("routed"),
    };
    if let Some(wrong) = wrong {
        let key = if matches!(nic.kind, NicKind::Network { .. }) { "network" } else { "nictype" };
        return Err(Error::unsupported(format!(
            "NICs of type {wrong} are given to containers only; a virtual machine takes bridged and macvlan"
        ))
        .at(format!("devices.{name}.{key}")));
    }
    Ok((link, mtu))
}

/// What a NIC lets through where no network says it. On a network that is a bridge of the host it has the project's filters, as on
/// any other network.
pub(super) fn loose_port(
    link: &NicLink,
    nic: &NicDevice,
    interface: &str,
    filters: &[&str],
) -> Option<PortSpec> {
    let mut port = nic.port.clone();
    if let (NicLink::Bridge(_), NicKind::Network { .. }) = (link, &nic.kind) {
        put_filters(&mut port, filters);
    }
    match link {
        NicLink::Network(_) | NicLink::Macvlan(_) | NicLink::Physical(_) | NicLink::User {} => None,
        _ if port == PortSpec::default() => None,
        _ => Some(PortSpec { interface: interface.to_owned(), ..port }),
    }
}

/// Filters that a NIC on a bridge of the host has to say itself where its project demands them: they need its addresses, which nobody
/// else knows there.
///
/// # Errors
/// Forbidden, naming the key.
pub(super) fn demand_filters(device: &str, nic: &NicDevice, filters: &[&str]) -> Result<()> {
    let said = |key: &str| match key {
        "security.mac_filtering" => nic.port.mac_filter,
        "security.ipv4_filtering" => nic.port.ipv4_filter,
        _ => nic.port.ipv6_filter,
    };
    match filters.iter().find(|key| !said(key)) {
        None => Ok(()),
        Some(key) => {
            let text = format!(
                "a NIC on a bridge of the host without {key} is not allowed in this project (its {SPOOFING}); set it to true, with the \
                 address that it has where that is of a family"
            );
            Err(Error::forbidden(text).at(format!("devices.{device}.{key}")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use karst_model::device::Device;

    const ALL: &[&str] = &["security.mac_filtering", "security.ipv4_filtering", "security.ipv6_filtering"];

    fn nic(pairs: &[(&str, &str)]) -> NicDevice {
        let all = [("type", "nic")].into_iter().chain(pairs.iter().copied());
        match Device::parse("eth0", &all.map(|(k, v)| (k.to_owned(), v.to_owned())).collect()) {
            Ok(Device::Nic(nic)) => nic,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn on_a_bridge_of_the_host_the_filters_of_a_project_are_said_and_are_there_anyway() {
        let bridge = NicLink::Bridge("br0".into());
        let plain = nic(&[("network", "lan")]);
        let e = demand_filters("eth0", &plain, ALL).unwrap_err();
        assert_eq!(e.field.as_deref(), Some("devices.eth0.security.mac_filtering"));
        assert_eq!(demand_filters("eth0", &plain, &[]), Ok(()));
        assert_eq!(loose_port(&bridge, &plain, "tap1", &[]), None);
        let port = loose_port(&bridge, &plain, "tap1", ALL).unwrap();
        assert!(port.mac_filter && port.ipv4_filter && port.ipv6_filter && port.interface == "tap1");

        let some = nic(&[
            ("network", "lan"),
            ("security.mac_filtering", "true"),
            ("security.ipv4_filtering", "true"),
            ("ipv4.address", "192.0.2.5"),
        ]);
        assert_eq!(demand_filters("eth0", &some, &ALL[..2]), Ok(()));
        let e = demand_filters("eth0", &some, ALL).unwrap_err();
        assert_eq!(e.field.as_deref(), Some("devices.eth0.security.ipv6_filtering"));
        // What an administrator lets a NIC name itself is none of the project's networks.
        let named = nic(&[("nictype", "bridged"), ("parent", "br0")]);
        assert_eq!(loose_port(&bridge, &named, "tap1", ALL), None);
    }
}
