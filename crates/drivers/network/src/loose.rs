//! Ports of guests that are on no network of ours: on a bridge of the host, or at the end of a cable. What they may send, and
//! how much, stands in the same tables as the rules of networks.

use crate::{NetworkDriver, blocking, record, ruleset::Table};
use ipnet::IpNet;
use karst_model::{
    InstanceId, Result,
    network::BridgeSpec,
    network_ports::RateMore,
    spec::{NetworkHost, NetworkSpec, PortSpec},
};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Such a port.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoosePort {
    /// The guest's addresses as far as they are fixed, and the port, whose interface is named.
    pub host: NetworkHost,
    /// The host's end of a cable, not the port of a bridge.
    pub cable: bool,
    /// From a cable comes only what is from here; `None`: whatever it is.
    pub sources: Option<Vec<IpNet>>,
}

/// All of them, by guest.
pub(crate) type Loose = BTreeMap<InstanceId, Vec<LoosePort>>;

const FILE: &str = "loose.json";

impl NetworkDriver {
    /// Replaces the ports of a guest that are on no network; none of them when it ends.
    ///
    /// # Errors
    /// Internal.
    pub async fn set_loose(&self, guest: InstanceId, ports: Vec<LoosePort>) -> Result<()> {
        let mut firewall = self.0.firewall.lock().await;
        if firewall.loose.get(&guest).map_or(ports.is_empty(), |now| *now == ports) {
            return Ok(());
        }
        let mut all = firewall.loose.clone();
        match ports.is_empty() {
            true => drop(all.remove(&guest)),
            false => drop(all.insert(guest, ports)),
        }
        let (paths, written) = (self.0.paths.clone(), all.clone());
        blocking(move || {
            paths.prepare()?;
            record::write_file(&paths.0.join(FILE), &serde_json::to_vec(&written)?, 0o600, None, false)
        })
        .await?;
        firewall.set_loose(all);
        firewall.reconcile(&self.0.daemon, &self.0.paths).await
    }

    /// Reads what an earlier process was told; those of guests that are not `known` are forgotten.
    ///
    /// # Errors
    /// Internal.
    pub async fn adopt_loose(&self, known: impl Fn(InstanceId) -> bool) -> Result<()> {
        let path = self.0.paths.0.join(FILE);
        let mut all: Loose = blocking(move || Ok(record::read_json(&path)?.unwrap_or_default())).await?;
        all.retain(|id, _| known(*id));
        let mut firewall = self.0.firewall.lock().await;
        if all.is_empty() && firewall.loose.is_empty() {
            return Ok(());
        }
        firewall.set_loose(all);
        firewall.reconcile(&self.0.daemon, &self.0.paths).await
    }
}

/// The ports of bridges as a network of nobody, for the rules of ports.
pub(crate) fn network(loose: &Loose) -> NetworkSpec {
    NetworkSpec {
        id: uuid::Uuid::nil().into(),
        bridge: String::new(),
        spec: BridgeSpec::default(),
        hosts: loose.values().flatten().filter(|p| !p.cable).map(|p| p.host.clone()).collect(),
        acls: vec![],
        sets: vec![],
        forwards: vec![],
        owner: None,
    }
}

/// Rules of cables: they end on the host itself, so what they carry is seen where the host receives and sends.
pub(crate) fn cables(t: &mut Table, loose: &Loose) {
    for cable in loose.values().flatten().filter(|p| p.cable) {
        let Some(port) = &cable.host.port else { continue };
        let name = port.interface.replace(['.', '-'], "_");
        let mut from = vec![];
        for (v4, word) in [(true, "ip"), (false, "ip6")] {
            let Some(sources) = &cable.sources else { continue };
            let mut own: Vec<String> =
                sources.iter().filter(|n| n.addr().is_ipv4() == v4).map(|n| n.trunc().to_string()).collect();
            if !v4 {
                own.extend(["fe80::/10".to_owned(), "::".to_owned()]);
            }
            from.push(match own.is_empty() {
                true => format!("meta nfproto ipv{} drop", if v4 { 4 } else { 6 }),
                false => format!("{word} saddr != {{ {} }} drop", own.join(", ")),
            });
        }
        let mut to = vec![];
        from.extend(port.egress_limit.into_iter().flat_map(|average| rates(average, port.egress)));
        to.extend(port.ingress_limit.into_iter().flat_map(|average| rates(average, port.ingress)));
        from.extend(port.priority.and_then(priority));
        for (map, base, hook, word, rules) in [
            ("cable_from", "cables_in", "prerouting priority -310", "iifname", from),
            ("cable_to", "cables_out", "postrouting priority 310", "oifname", to),
        ] {
            if rules.is_empty() {
                continue;
            }
            let first = t.base(base, &format!("filter hook {hook}; policy accept"));
            if first.is_empty() {
                first.push(format!("{word} vmap @{map}"));
            }
            let chain = format!("{}_{name}", if map == "cable_from" { "ci" } else { "co" });
            t.map(map, "type ifname : verdict;").insert(format!("\"{}\" : jump {chain}", port.interface));
            *t.chain(&chain) = rules;
        }
    }
}

/// Bytes of so many bits a second, as many as the kernel takes with a burst beside them: one rule that it refuses would keep all
/// tables of the host from changing, and a record may be older than the bound of the keys.
fn bytes(bits: u64) -> u64 {
    (bits / 8).clamp(1, 12_500_000_000)
}

/// What is more than so many bits a second is dropped. At once passes what the kernel's bucket holds: a second's worth and the
/// burst (`nft_limit`).
pub(crate) fn rate(bits: u64) -> String {
    let bytes = bytes(bits);
    format!("limit rate over {bytes} bytes/second burst {} bytes drop", (bytes / 8).clamp(65_536, 1 << 30))
}

/// The same with its peak, which is a bucket of its own, and its burst.
pub(crate) fn rates(average: u64, more: RateMore) -> Vec<String> {
    let peak = more.peak.map(rate);
    let average = match more.burst {
        None => rate(average),
        Some(burst) => {
            let burst = burst.clamp(10_000, 1 << 30);
            format!("limit rate over {} bytes/second burst {burst} bytes drop", bytes(average))
        }
    };
    peak.into_iter().chain([average]).collect()
}

/// A packet's priority on the host; 0 is what it has anyway.
pub(crate) fn priority(n: u32) -> Option<String> {
    (n > 0).then(|| format!("meta priority set {:x}:{:x}", n >> 16, n & 0xffff))
}

/// A port of which nothing is demanded needs no rule.
pub(crate) fn has_rules(port: &PortSpec) -> bool {
    *port != PortSpec { interface: port.interface.clone(), ..Default::default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_rate_is_more_than_the_kernel_takes() {
        assert_eq!(rate(80_000_000), "limit rate over 10000000 bytes/second burst 1250000 bytes drop");
        let most = "limit rate over 12500000000 bytes/second burst 1073741824 bytes drop";
        assert_eq!(rate(u64::MAX), most);
        assert_eq!(rate(0), "limit rate over 1 bytes/second burst 65536 bytes drop");
        let more = RateMore { peak: Some(u64::MAX), burst: Some(u64::MAX) };
        assert_eq!(rates(u64::MAX, more), [most, most]);
        let more = RateMore { peak: None, burst: Some(1) };
        assert_eq!(rates(8000, more), ["limit rate over 1000 bytes/second burst 10000 bytes drop"]);
    }
}
