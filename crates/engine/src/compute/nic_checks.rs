//! What NICs may say of the networks that they are on. Whoever may have an instance may write NICs, and what they say becomes
//! addresses, routes and rules of the host that all projects share: so there is one function that asks, for every way in which
//! a NIC can come about or change (creation, edit, profile, copy, move, import, restore, recovery), and one that leaves out
//! what records say all the same.

use super::{
    expand::ParsedDevices,
    nics::{demand_filters, demand_no_lease, demand_plain, network_of},
};
use crate::{EngineInner, Records, db::Tx};
use karst_model::{
    Error, ProfileId, ProjectId, Result,
    device::{HostDevice, NicDevice, NicKind, PortEnd},
    instance::Instance,
    network::BridgeSpec,
    spec::NetworkHost,
    uplink::{NetworkForm, NetworkKind},
};
use std::{collections::BTreeSet, net::IpAddr};

impl EngineInner {
    /// The NICs of an instance, whose identities are those that it is to have, fit the networks that they are on and take
    /// nothing of another guest; and stay so until the transaction.
    ///
    /// # Errors
    /// Not found, invalid and conflict, naming the device and key.
    pub(crate) fn check_nics(
        &self,
        records: &Records,
        tx: &mut Tx,
        instance: &Instance,
        parsed: &ParsedDevices,
    ) -> Result<()> {
        self.check_nics_besides(records, tx, instance, parsed, None)
    }

    /// The same, where the users of a profile change together. What they take of one another is theirs to settle.
    pub(crate) fn check_nics_besides(
        &self,
        records: &Records,
        tx: &mut Tx,
        instance: &Instance,
        parsed: &ParsedDevices,
        together: Option<ProfileId>,
    ) -> Result<()> {
        check_ports(records, tx, instance.project, parsed)?;
        demand_own(instance, parsed)?;
        self.check_addresses(records, Some(tx), instance, parsed, together)
    }
}

/// What goes out as the host itself, and what leads to paths and addresses of the host, is given by an administrator to one
/// machine, and by no profile. The instance is the one that is recorded, without what its profiles say.
///
/// # Errors
/// Invalid, naming the device and key.
pub(crate) fn demand_own(instance: &Instance, parsed: &ParsedDevices) -> Result<()> {
    let foreign = |device: &String| !instance.devices.contains_key(device);
    let mut all = parsed.nics.iter().filter(|(_, nic)| nic.kind == NicKind::User);
    if let Some((device, _)) = all.find(|(device, _)| foreign(device)) {
        let text = "a NIC of nictype user is a device of the instance itself and of no profile";
        return Err(Error::invalid(format!("devices.{device}.nictype"), text));
    }
    for (device, port) in parsed.ports.iter().filter(|(device, _)| foreign(device)) {
        let key = match &port.to {
            PortEnd::Stream {}
            | PortEnd::Null {}
            | PortEnd::Screen {}
            | PortEnd::Agent { .. }
            | PortEnd::Spice {} => {
                if port.log.is_none() {
                    continue;
                }
                "log"
            }
            PortEnd::File(_) | PortEnd::Device { .. } | PortEnd::Unix { .. } | PortEnd::Tcp { .. } => "to",
        };
        let text = "a port that leads to a path or an address of the host is a device of the instance itself and of no profile";
        return Err(Error::invalid(format!("devices.{device}.{key}"), text));
    }
    let input =
        |(device, given): &&(String, HostDevice)| matches!(given, HostDevice::Input(_)) && foreign(device);
    if let Some((device, _)) = parsed.given.iter().find(input) {
        let text = "a device of input of the host is a device of the instance itself and of no profile";
        return Err(Error::invalid(format!("devices.{device}.source"), text));
    }
    Ok(())
}

/// The networks of NICs exist and stay as they were read, and have what the NICs say.
fn check_ports(records: &Records, tx: &mut Tx, project: ProjectId, parsed: &ParsedDevices) -> Result<()> {
    let mut seen = BTreeSet::new();
    for (device, nic) in &parsed.nics {
        let NicDevice { ipv4, ipv6, port, routes, .. } = nic;
        let Some((network, row)) = network_of(records, project, device, nic)? else { continue };
        let bridge = match row.form()? {
            NetworkForm::Bridge(bridge) => bridge,
            NetworkForm::Uplink(uplink) => {
                match uplink.kind {
                    NetworkKind::HostBridge => {
                        demand_filters(device, nic, records.filters_of(project))?;
                        demand_no_lease(device, nic, &uplink.link.parent)?;
                    }
                    kind => demand_plain(device, nic, kind)?,
                }
                if seen.insert(row.id) {
                    tx.expect(row);
                    tx.expect_unlocked(&crate::network::lock(row.id));
                    tx.touch(&crate::network::lock(row.id));
                }
                continue;
            }
        };
        let addresses = [("ipv4", ipv4.map(IpAddr::from)), ("ipv6", ipv6.map(IpAddr::from))];
        for (family, address) in addresses {
            if let Some(address) = address.filter(|a| !bridge.takes(*a)) {
                let field = format!("devices.{device}.{family}.address");
                let subnet = match family {
                    "ipv4" => bridge.ipv4.map(|n| n.to_string()),
                    _ => bridge.ipv6.map(|n| n.to_string()),
                };
                return Err(Error::invalid(
                    field,
                    match subnet {
                        Some(subnet) => format!(
                            "{address} is not an address for a guest of network {network:?}; choose one within {subnet} that is not the network's own"
                        ),
                        None => format!("network {network:?} has no {family} subnet"),
                    },
                ));
            }
        }
        // They become routes of the host: whoever may have an instance must not turn others' traffic to it.
        if let Some(route) = routes.iter().find(|r| !bridge.routed().any(|net| net.contains(*r))) {
            let family = if route.addr().is_ipv4() { "ipv4" } else { "ipv6" };
            return Err(Error::invalid(
                format!("devices.{device}.{family}.routes"),
                format!("{route} is not within {family}.routes of network {network:?}"),
            ));
        }
        if let Some(group) = port.group.as_deref().filter(|name| bridge.ports.group(Some(name)).is_none()) {
            let text = format!("network {network:?} has no group of ports {group:?}");
            return Err(Error::invalid(format!("devices.{device}.portgroup"), text));
        }
        let field = format!("devices.{device}.security.acls");
        crate::firewall::check_policy(records, tx, project, port.policy.as_ref(), &field)?;
        if seen.insert(row.id) {
            tx.expect(row);
            tx.expect_unlocked(&crate::network::lock(row.id));
            tx.touch(&crate::network::lock(row.id));
        }
    }
    Ok(())
}

/// Leaves out what is none of the network's: addresses beyond its subnets, routes that it does not give away. A host would
/// refuse the whole network because of one guest, or send it what is others'. Says, for people, what was left out.
pub(crate) fn confine(spec: &BridgeSpec, hosts: &mut [NetworkHost]) -> Vec<String> {
    let mut said = vec![];
    for host in hosts {
        let name = host.hostname.clone();
        let mut outside = |address: IpAddr| {
            let is = !spec.takes(address);
            if is {
                said.push(format!(
                    "guest {name:?} has address {address}, which is not the network's to give"
                ));
            }
            is
        };
        host.ipv4.take_if(|a| outside((*a).into()));
        host.ipv6.take_if(|a| outside((*a).into()));
        host.routes.retain(|route| {
            let routed = spec.routed().any(|net| net.contains(route));
            if !routed {
                said.push(format!(
                    "guest {name:?} has the route {route}, which is not the network's to give"
                ));
            }
            routed
        });
    }
    said
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_the_networks_is_left_out_and_said() {
        let spec = BridgeSpec {
            ipv4: Some("10.1.0.1/24".parse().unwrap()),
            ipv6: Some("fd42:1::1/64".parse().unwrap()),
            routes: vec!["192.0.2.0/25".parse().unwrap()],
            ..BridgeSpec::default()
        };
        let host = |ipv4: &str, ipv6: &str, routes: &[&str]| NetworkHost {
            mac: "10:66:6a:00:00:01".into(),
            hostname: "a".into(),
            ipv4: Some(ipv4.parse().unwrap()),
            ipv6: Some(ipv6.parse().unwrap()),
            routes: routes.iter().map(|r| r.parse().unwrap()).collect(),
            ..NetworkHost::default()
        };
        let fine = host("10.1.0.9", "fd42:1::9", &["192.0.2.0/26", "192.0.2.64/32"]);
        let mut hosts = vec![
            fine.clone(),
            host("10.1.0.1", "fd42:1::9", &[]),
            host("10.99.99.99", "fd42:2::9", &["192.0.2.0/24", "192.0.2.0/25", "1.1.1.1/32", "::/0"]),
        ];
        let said = confine(&spec, &mut hosts);
        assert_eq!(hosts[0], fine);
        assert_eq!((hosts[1].ipv4, hosts[1].ipv6), (None, fine.ipv6));
        assert_eq!((hosts[2].ipv4, hosts[2].ipv6), (None, None));
        assert_eq!(hosts[2].routes, host("10.1.0.9", "fd42:1::9", &["192.0.2.0/25"]).routes);
        assert_eq!(said.len(), 6, "{said:?}");
        assert!(said[2].contains("fd42:2::9") && said[5].contains("::/0"), "{said:?}");
        assert_eq!(confine(&spec, &mut hosts), [""; 0]);
    }
}
