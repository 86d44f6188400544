//! What becomes of a packet between guests and addresses, by the records and the leases of this moment.

use crate::{Engine, Records, context::Context};
use karst_agent::CallContext;
use karst_model::{
    Error, Result,
    access::Permission,
    firewall::evaluate::{self, End, Explanation, Packet, Payload},
    spec::{NetworkHost, NetworkSpec},
};
use std::{collections::BTreeMap, net::IpAddr, time::Duration};

impl Engine {
    /// What becomes of the first packet of a connection: `from` and `to` are instances of the project or addresses, `port` is
    /// `tcp/80`, `80`, `udp/53` or `icmp`.
    ///
    /// # Errors
    /// Not found, invalid, forbidden; conflict when an instance has no address that is known.
    pub async fn network_explain(
        &self,
        context: &Context,
        project: &str,
        from: &str,
        to: &str,
        port: &str,
    ) -> Result<Explanation> {
        let project = self.project(context, project, Permission::ProjectView)?;
        let (networks, nics) = {
            let records = self.inner().inventory.read();
            let mut nics: BTreeMap<String, Vec<String>> = BTreeMap::new();
            for name in [from, to] {
                if let Ok(instance) = records.instance(&project, name) {
                    let macs = instance.identities.values().filter_map(|i| i.mac.clone());
                    nics.insert(name.to_owned(), macs.collect());
                } else if name.parse::<IpAddr>().is_err() {
                    return Err(Error::not_found(format!(
                        "{name:?} is neither an address nor an instance of project {:?}",
                        &*project.name
                    )));
                }
            }
            let specs = records.networks.iter().filter_map(|(id, network)| {
                if !network.is_active() {
                    return None;
                }
                let mut spec = self.inner().network_spec(&records, *id).ok()?;
                spec.bridge = network.name.to_string();
                if !records.sees_network(&project, network) {
                    // It decides about packets all the same.
                    spec.bridge = "that is another project's".into();
                }
                Some(spec)
            });
            (specs.collect::<Vec<_>>(), nics)
        };
        let mut networks = self.with_leases(networks).await;
        {
            let records = self.inner().inventory.read();
            unname_guests(&records, context, networks.iter_mut().flat_map(|n| &mut n.hosts));
        }
        let (packet, end) = first_packet(&networks, &nics, from, to, port)?;
        Ok(evaluate::explain(&networks, end, packet))
    }

    /// Fills in the addresses that guests have from DHCP.
    async fn with_leases(&self, mut networks: Vec<NetworkSpec>) -> Vec<NetworkSpec> {
        let inner = self.inner();
        let Ok(agent) = inner.agents.get(inner.node) else { return networks };
        for network in &mut networks {
            let Ok(leases) =
                agent.network_leases(&CallContext::read(Duration::from_secs(10)), network.id).await
            else {
                continue;
            };
            for host in &mut network.hosts {
                for lease in leases.iter().filter(|l| l.mac == host.mac) {
                    match lease.address {
                        IpAddr::V4(a) => host.ipv4 = host.ipv4.or(Some(a)),
                        IpAddr::V6(a) if !lease.fixed && !network.spec.slaac() => {
                            host.ipv6 = host.ipv6.or(Some(a));
                        }
                        IpAddr::V6(_) => {}
                    }
                }
            }
        }
        networks
    }
}

/// One network serves several projects: guests of those that `context` may not see lose their names, before something is
/// said of them.
pub(crate) fn unname_guests<'a>(
    records: &Records,
    context: &Context,
    hosts: impl Iterator<Item = &'a mut NetworkHost>,
) {
    for host in hosts {
        let mut owners = records.with_mac(&host.mac).filter_map(|id| records.instances.get(&id));
        if !owners.all(|i| context.principal().may(Permission::ProjectView, Some(i.project))) {
            host.hostname = "another project's guest".into();
        }
    }
}

/// The packet that is asked about, and where it begins.
fn first_packet(
    networks: &[NetworkSpec],
    nics: &BTreeMap<String, Vec<String>>,
    from: &str,
    to: &str,
    port: &str,
) -> Result<(Packet, End)> {
    let candidates = |name: &str| -> Vec<(Option<End>, IpAddr)> {
        if let Ok(address) = name.parse::<IpAddr>() {
            for (n, network) in networks.iter().enumerate() {
                let has =
                    |h: &karst_model::spec::NetworkHost| evaluate::addresses(network, h).contains(&address);
                if let Some(h) = network.hosts.iter().position(has) {
                    return vec![(Some(End::Guest(n, h)), address)];
                }
                let own = network.spec.ipv4.is_some_and(|g| IpAddr::V4(g.addr()) == address)
                    || network.spec.ipv6.is_some_and(|g| IpAddr::V6(g.addr()) == address);
                if own {
                    return vec![(Some(End::Host), address)];
                }
            }
            return vec![(None, address)];
        }
        let mut found = vec![];
        for (n, network) in networks.iter().enumerate() {
            for (h, host) in network.hosts.iter().enumerate() {
                if nics.get(name).is_some_and(|macs| macs.contains(&host.mac)) {
                    let all = evaluate::addresses(network, host).into_iter();
                    found.extend(all.map(|a| (Some(End::Guest(n, h)), a)));
                }
            }
        }
        found
    };
    let (sources, destinations) = (candidates(from), candidates(to));
    for (name, list) in [(from, &sources), (to, &destinations)] {
        if list.is_empty() {
            return Err(Error::conflict(format!(
                "instance {name:?} has no address on a managed network that is known; start it, or name an address"
            )));
        }
    }
    let same_network = |a: &Option<End>, b: &Option<End>| match (a, b) {
        (Some(End::Guest(n, _)), Some(End::Guest(m, _))) => n == m,
        _ => false,
    };
    let pairs = || {
        sources
            .iter()
            .flat_map(|s| destinations.iter().map(move |d| (s, d)))
            .filter(|(s, d)| s.1.is_ipv4() == d.1.is_ipv4())
    };
    let ((end, source), (_, destination)) = pairs()
        .find(|(s, d)| same_network(&s.0, &d.0))
        .or_else(|| pairs().next())
        .ok_or_else(|| Error::invalid("to", "the two have no addresses of the same IP version"))?;
    let number = |text: &str| {
        text.parse::<u16>().ok().filter(|p| *p > 0).ok_or_else(|| {
            Error::invalid("port", format!("{text:?} is not a port; write tcp/80, udp/53, 80 or icmp"))
        })
    };
    let payload = match port.split_once('/') {
        None if port == "icmp" => Payload::Icmp(if source.is_ipv4() { 8 } else { 128 }, 0),
        None => Payload::Tcp(49_152, number(port)?),
        Some(("tcp", p)) => Payload::Tcp(49_152, number(p)?),
        Some(("udp", p)) => Payload::Udp(49_152, number(p)?),
        Some(_) => return Err(Error::invalid("port", format!("{port:?}: write tcp/80, udp/53, 80 or icmp"))),
    };
    let packet = Packet { source: *source, destination: *destination, payload };
    Ok((packet, end.unwrap_or(End::Outside)))
}
