//! Addresses on networks: no two guests of a network, whatever its kind, have the same MAC, and no two of a bridge the
//! same static address. Said when a request asks for them; what records say all the same (they are older, or a profile
//! gives one address to two) is settled so that one guest's fault never keeps a whole network from being brought up to
//! date.

use super::{expand::ParsedDevices, labels, nic_checks::confine, nics::network_of};
use crate::{EngineInner, Records, Row, db::Tx};
use karst_model::{
    Error, InstanceId, ProfileId, ProjectId, Result,
    device::NicDevice,
    instance::{DeviceIdentity, Hardware, Instance},
    network::Network,
    spec::NetworkHost,
    uplink::NetworkKind,
};
use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

/// How often another MAC is drawn when the one that was drawn is taken: 24 bits are random.
const DRAWS: usize = 16;

/// What of an address two guests share.
#[derive(Debug, PartialEq, Eq)]
enum Shared {
    Mac(String),
    Ipv4(std::net::Ipv4Addr),
    Ipv6(std::net::Ipv6Addr),
}

impl Shared {
    fn of(one: &NetworkHost, other: &NetworkHost) -> Option<Self> {
        if one.mac == other.mac {
            return Some(Self::Mac(one.mac.clone()));
        }
        let both4 = one.ipv4.filter(|a| other.ipv4 == Some(*a)).map(Self::Ipv4);
        both4.or_else(|| one.ipv6.filter(|a| other.ipv6 == Some(*a)).map(Self::Ipv6))
    }

    fn key(&self) -> &'static str {
        match self {
            Self::Mac(_) => "hwaddr",
            Self::Ipv4(_) => "ipv4.address",
            Self::Ipv6(_) => "ipv6.address",
        }
    }
}

impl std::fmt::Display for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Mac(mac) => write!(f, "MAC address {mac}"),
            Self::Ipv4(address) => write!(f, "address {address}"),
            Self::Ipv6(address) => write!(f, "address {address}"),
        }
    }
}

impl EngineInner {
    /// Ids and addresses for devices that have none yet; see [`super::expand::assign_identities`]. A MAC that is drawn is
    /// no other instance's.
    pub(crate) fn assign_identities(
        &self,
        records: &Records,
        old: &BTreeMap<String, DeviceIdentity>,
        parsed: &ParsedDevices,
        hardware: Option<&Hardware>,
        root: karst_model::VolumeId,
    ) -> BTreeMap<String, DeviceIdentity> {
        self.assign_beside(records, (old, &BTreeMap::new()), parsed, hardware, root)
    }

    /// The same, where places of the second of the two are taken; see [`super::expand::assign_beside`].
    pub(crate) fn assign_beside(
        &self,
        records: &Records,
        (old, beside): (&BTreeMap<String, DeviceIdentity>, &BTreeMap<String, DeviceIdentity>),
        parsed: &ParsedDevices,
        hardware: Option<&Hardware>,
        root: karst_model::VolumeId,
    ) -> BTreeMap<String, DeviceIdentity> {
        let random = &mut |bytes: &mut [u8]| self.env.fill_random(bytes);
        let of = (root, self.daemon_id.as_str());
        let mut new = super::expand::assign_beside(old, beside, parsed, hardware, of, random);
        for (name, nic) in &parsed.nics {
            let kept = nic.mac.is_some() || old.get(name).is_some_and(|i| i.mac.is_some());
            let Some(identity) = new.get_mut(name).filter(|_| !kept) else { continue };
            for _ in 0..DRAWS {
                if identity.mac.as_deref().is_none_or(|mac| free_mac(records, mac)) {
                    break;
                }
                identity.mac = Some(super::expand::draw_mac(random));
            }
        }
        new
    }

    /// The guests of a network as records have them, but for some of them.
    pub(crate) fn hosts_on(
        &self,
        records: &Records,
        network: &Network,
        except: &BTreeSet<InstanceId>,
    ) -> Vec<NetworkHost> {
        let mut hosts = vec![];
        let users = records.network_users(network.project);
        let instances = records.instances.values().filter(|i| users.contains(&i.project));
        for id in instances.map(|i| i.id).filter(|id| !except.contains(id)) {
            let Some(view) = self.inventory.view(records, id) else { continue };
            let on = view.nics.iter().filter(|(on, _)| on.is(network));
            hosts.extend(on.map(|(_, host)| host.clone()));
        }
        hosts
    }

    /// The addresses of an instance's NICs are no other guest's, and their routes no other project's. With a transaction: and
    /// stay so, where a request named them. Other users of the profile `together` change at the same time.
    ///
    /// # Errors
    /// Conflict, naming the key, and the other guest where it is of the same project.
    pub(crate) fn check_addresses(
        &self,
        records: &Records,
        mut tx: Option<&mut Tx>,
        instance: &Instance,
        parsed: &ParsedDevices,
        together: Option<ProfileId>,
    ) -> Result<()> {
        let mut expected = BTreeSet::new();
        let mut own: Vec<(karst_model::NetworkId, NetworkHost)> = vec![];
        for (device, nic) in &parsed.nics {
            let NicDevice { ipv4, ipv6, routes, mac: wanted, .. } = nic;
            let Some((_, network)) = network_of(records, instance.project, device, nic)? else { continue };
            let identity = instance.identities.get(device);
            let Some(mac) = identity.and_then(|i| i.mac.clone()) else { continue };
            // Of what is not a bridge of ours nobody here gives addresses out: the guests on it share the wire and no more.
            let (ipv4, ipv6) = match network.kind {
                NetworkKind::Bridge => (*ipv4, *ipv6),
                NetworkKind::Macvlan | NetworkKind::Physical | NetworkKind::HostBridge => (None, None),
            };
            let host = NetworkHost { mac, ipv4, ipv6, ..Default::default() };
            let refuse = |shared: &Shared, by: &str| {
                Error::conflict(format!(
                    "the {shared} is taken on network {:?}{by}; choose another one",
                    &*network.name
                ))
                .at(format!("devices.{device}.{}", shared.key()))
            };
            let twice = own.iter().filter(|(on, _)| *on == network.id);
            if let Some(shared) = twice.map(|(_, other)| other).find_map(|other| Shared::of(&host, other)) {
                return Err(refuse(&shared, " by another NIC of the same instance"));
            }
            // Without an address of its own it can share the MAC only, and there is an index of these: with thousands of
            // guests on a network a look at each would be most of what a creation costs.
            let users = records.network_users(network.project);
            let fixed = host.ipv4.is_some() || host.ipv6.is_some() || !routes.is_empty();
            let others: Vec<InstanceId> = match fixed {
                true => records.instances.keys().copied().collect(),
                false => records.with_mac(&host.mac).collect(),
            };
            for id in others.into_iter().filter(|id| *id != instance.id) {
                let Some(other) = records.instances.get(&id) else { continue };
                if together.is_some_and(|profile| other.profiles.contains(&profile)) {
                    continue;
                }
                if !users.contains(&other.project) {
                    continue;
                }
                let Some(view) = self.inventory.view(records, id) else { continue };
                let on = view.nics.iter().filter(|(on, _)| on.is(network));
                let theirs: Vec<&NetworkHost> = on.map(|(_, theirs)| theirs).collect();
                let same = other.project == instance.project;
                // Within a project several may have a route, such as those that take over from one another.
                let foreign = theirs.iter().filter(|_| !same).flat_map(|t| t.routes.iter().copied());
                let foreign: Vec<_> = foreign.collect();
                let overlaps = |r: &&ipnet::IpNet| foreign.iter().any(|t| t.contains(*r) || r.contains(t));
                if let Some(route) = routes.iter().find(overlaps) {
                    let family = if route.addr().is_ipv4() { "ipv4" } else { "ipv6" };
                    return Err(Error::conflict(format!(
                        "{route} is routed to a guest of another project on network {:?}; choose another subnet",
                        &*network.name
                    ))
                    .at(format!("devices.{device}.{family}.routes")));
                }
                if let Some(shared) = theirs.into_iter().find_map(|theirs| Shared::of(&host, theirs)) {
                    let by = if same { format!(" by instance {:?}", &*other.name) } else { String::new() };
                    return Err(refuse(&shared, &by));
                }
            }
            // Who draws a number collides with nobody; who names one must be the only one to do so meanwhile.
            let named = wanted.is_some() || fixed;
            if let Some(tx) = tx.as_deref_mut().filter(|_| named && expected.insert(network.id)) {
                tx.expect_untouched(records, &crate::network::lock(network.id));
            }
            own.push((network.id, host));
        }
        Ok(())
    }

    /// As [`Self::check_addresses`], for the NICs that instances are about to have on `network`.
    pub(crate) fn demand_own_addresses(
        &self,
        records: &Records,
        network: &Network,
        from: ProjectId,
        instances: &[Instance],
    ) -> Result<Vec<NetworkHost>> {
        let mut hosts = self.hosts_on(records, network, &instances.iter().map(|i| i.id).collect());
        for instance in instances {
            let own = records.nics_of(instance, &records.expanded(instance).1).into_iter();
            let here = records.network_home(instance.project) == network.project;
            for (_, host) in own.filter(|(on, _)| here && on.is(network)) {
                if let Some(shared) = hosts.iter().find_map(|theirs| Shared::of(&host, theirs)) {
                    return Err(Error::conflict(format!(
                        "the {shared} of {} is another guest's on network {:?}; give it another one",
                        super::called(from, instance),
                        &*network.name
                    )));
                }
                hosts.push(host);
            }
        }
        Ok(hosts)
    }
}

/// A MAC that no other instance's interface has.
pub(crate) fn free_mac(records: &Records, mac: &str) -> bool {
    records.with_mac(mac).next().is_none()
}

/// Puts guests into a fixed order, the second of two with one MAC left out, the second of two with one static address left
/// without it: a host refuses a network of which it is told both. Says, for people, what was so settled.
pub(crate) fn settle(hosts: &mut Vec<NetworkHost>) -> Vec<String> {
    hosts.sort();
    let mut said = vec![];
    let (mut macs, mut addresses) = (BTreeMap::new(), BTreeMap::new());
    hosts.retain_mut(|host| {
        if let Some(first) = macs.get(&host.mac) {
            said.push(format!("guest {:?} has MAC address {} of guest {first:?}", host.hostname, host.mac));
            return false;
        }
        macs.insert(host.mac.clone(), host.hostname.clone());
        let v4 = host.ipv4.map(IpAddr::from);
        for address in [v4, host.ipv6.map(IpAddr::from)].into_iter().flatten() {
            let Some(first) = addresses.get(&address) else {
                addresses.insert(address, host.hostname.clone());
                continue;
            };
            said.push(format!("guest {:?} has address {address} of guest {first:?}", host.hostname));
            match address {
                IpAddr::V4(_) => host.ipv4 = None,
                IpAddr::V6(_) => host.ipv6 = None,
            }
        }
        true
    });
    said
}

/// What two guests of a network have, each in words.
pub(crate) struct Settled {
    pub(crate) network: karst_model::NetworkId,
    /// What is not the network's to give.
    pub(crate) outside: Vec<String>,
    pub(crate) addresses: Vec<String>,
    pub(crate) names: Vec<String>,
}

impl EngineInner {
    /// What [`confine`] and [`settle`] say of each network, and what [`labels::settle`] says of each bridge.
    pub(crate) fn shared(&self, records: &Records) -> Vec<Settled> {
        let of = |network: &Row<Network>| {
            let mut hosts = self.hosts_on(records, network, &BTreeSet::new());
            let bridge = network.kind == NetworkKind::Bridge;
            let spec = if bridge { network.bridge().ok() } else { None };
            let outside = spec.map(|spec| confine(&spec, &mut hosts)).unwrap_or_default();
            let addresses = settle(&mut hosts);
            let names = if bridge { labels::settle(records, &mut hosts) } else { vec![] };
            Settled { network: network.id, outside, addresses, names }
        };
        records.networks.values().map(of).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(mac: &str, name: &str, address: Option<[u8; 4]>) -> NetworkHost {
        let ipv4 = address.map(Into::into);
        NetworkHost { mac: mac.into(), hostname: name.into(), ipv4, ..Default::default() }
    }

    #[test]
    fn of_two_with_one_address_the_first_keeps_it() {
        let hosts = vec![
            host("10:66:6a:00:00:02", "b", Some([10, 0, 0, 5])),
            host("10:66:6a:00:00:01", "a", Some([10, 0, 0, 5])),
            host("10:66:6a:00:00:02", "c", Some([10, 0, 0, 6])),
            host("10:66:6a:00:00:03", "d", None),
        ];
        let mut left = hosts;
        let said = settle(&mut left);
        let seen: Vec<_> = left.iter().map(|h| (h.hostname.as_str(), h.ipv4.is_some())).collect();
        assert_eq!(seen, [("a", true), ("b", false), ("d", false)]);
        let wrong = [
            "guest \"b\" has address 10.0.0.5 of guest \"a\"",
            "guest \"c\" has MAC address 10:66:6a:00:00:02 of guest \"b\"",
        ];
        assert_eq!(said, wrong);
        assert_eq!(settle(&mut left), [""; 0]);
    }
}
