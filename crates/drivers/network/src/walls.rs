//! Walls: between networks of different projects, and between them and those that projects share, the host forwards nothing, and
//! answers at the bridge of a network to that network's own guests only. What a forward publishes is for everybody. Pure.
//!
//! A side is a project with its own networks, or all that projects share; each side has a chain and a few sets, so that a host with
//! hundreds of tenants has as many, and not one for each pair. Whose guest is at the other end of a cable (a NIC on no bridge), the
//! rules do not know: between cables and what is a project's alone nothing passes either.

use crate::ruleset::Table;
use karst_model::spec::NetworkSpec;

const FORWARD: &str = "filter hook forward priority filter - 1; policy accept";
const INPUT: &str = "filter hook input priority filter - 1; policy accept";

/// The rules, where there is anything to be apart from.
pub(crate) fn rules(daemon: &str, t: &mut Table, networks: &[NetworkSpec]) {
    if networks.iter().all(|network| network.owner.is_none()) {
        return;
    }
    // What every interface of this daemon's guests is called; those of ports of bridges are not seen where packets are routed.
    let cables = format!("\"k{daemon}*\"");
    // What the host itself began may have any of its addresses as source: answers come back to it.
    t.chain("walls_cables_host").extend(
        ["ct direction reply accept", "ip daddr @w4_own drop", "ip6 daddr @w6_own drop"].map(str::to_owned),
    );
    t.base("walls_host", INPUT)
        .extend([format!("iifname {cables} jump walls_cables_host"), "iifname vmap @walls_at".to_owned()]);
    t.chain("walls_cables").extend([
        "ct status & dnat != 0 accept".to_owned(),
        format!("iifname {cables} oifname @wb_own drop"),
        format!("iifname @wb_own oifname {cables} drop"),
    ]);
    t.base("walls", FORWARD).extend(["jump walls_cables", "iifname vmap @walls_from"].map(str::to_owned));
    for network in networks {
        if network.owner.is_some() {
            t.set("wb_own", "type ifname;").insert(format!("\"{}\"", network.bridge));
        }
        let side = network.owner.map_or("shared".to_owned(), |project| project.uuid().simple().to_string());
        let bridge = format!("\"{}\"", network.bridge);
        for bridges in [format!("wb_{side}"), "wb_all".to_owned()] {
            t.set(&bridges, "type ifname;").insert(bridge.clone());
        }
        let own = |name: &str| network.owner.map(|_| name.to_owned());
        for addresses in [format!("w4_{side}"), "w4_all".to_owned()].into_iter().chain(own("w4_own")) {
            t.set(&addresses, "type ipv4_addr;")
                .extend(network.spec.own4().map(|net| net.addr().to_string()));
        }
        for addresses in [format!("w6_{side}"), "w6_all".to_owned()].into_iter().chain(own("w6_own")) {
            t.set(&addresses, "type ipv6_addr;")
                .extend(network.spec.own6().map(|net| net.addr().to_string()));
        }
        t.map("walls_from", "type ifname : verdict;").insert(format!("{bridge} : goto wf_{side}"));
        t.map("walls_at", "type ifname : verdict;").insert(format!("{bridge} : goto wh_{side}"));
        *t.chain(&format!("wf_{side}")) = vec![
            "ct status & dnat != 0 accept".into(),
            format!("oifname @wb_{side} accept"),
            "oifname @wb_all drop".into(),
        ];
        *t.chain(&format!("wh_{side}")) = vec![
            format!("ip daddr @w4_{side} accept"),
            format!("ip6 daddr @w6_{side} accept"),
            "ip daddr @w4_all drop".into(),
            "ip6 daddr @w6_all drop".into(),
        ];
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use karst_model::{NetworkId, ProjectId, network::BridgeSpec};

    fn network(n: u128, owner: Option<u128>) -> NetworkSpec {
        NetworkSpec {
            id: NetworkId(uuid::Uuid::from_u128(n)),
            bridge: format!("br{n}"),
            spec: BridgeSpec {
                ipv4: Some(format!("10.77.{n}.1/24").parse().unwrap()),
                ..BridgeSpec::default()
            },
            hosts: vec![],
            acls: vec![],
            sets: vec![],
            forwards: vec![],
            owner: owner.map(|p| ProjectId(uuid::Uuid::from_u128(p))),
        }
    }

    fn table(networks: &[NetworkSpec]) -> Table {
        let mut t = Table::new("inet", "x".into());
        rules("ab12cd", &mut t, networks);
        t
    }

    #[test]
    fn without_networks_of_projects_there_are_no_walls() {
        assert!(table(&[network(1, None), network(2, None)]).is_empty());
        assert!(table(&[]).is_empty());
    }

    #[test]
    fn each_side_passes_to_itself_and_to_no_other() {
        let t = table(&[network(1, None), network(2, Some(7)), network(3, Some(7)), network(4, Some(8))]);
        let side = |p: u128| ProjectId(uuid::Uuid::from_u128(p)).uuid().simple().to_string();
        let elements = |name: &str| t.sets[name].elements.iter().cloned().collect::<Vec<_>>();
        assert_eq!(elements("wb_all"), ["\"br1\"", "\"br2\"", "\"br3\"", "\"br4\""]);
        assert_eq!(elements(&format!("wb_{}", side(7))), ["\"br2\"", "\"br3\""]);
        assert_eq!(elements("wb_shared"), ["\"br1\""]);
        assert_eq!(elements(&format!("w4_{}", side(8))), ["10.77.4.1"]);
        assert_eq!(elements("walls_from").len(), 4, "each bridge has its chain");
        let own = &t.chains[&format!("wf_{}", side(7))].rules;
        assert_eq!(own[1], format!("oifname @wb_{} accept", side(7)));
        assert_eq!(own.last().unwrap(), "oifname @wb_all drop");
        assert_eq!(elements("wb_own"), ["\"br2\"", "\"br3\"", "\"br4\""]);
        assert_eq!(t.chains["walls"].rules, ["jump walls_cables", "iifname vmap @walls_from"]);
        assert!(
            t.chains["walls_cables"].rules.contains(&"iifname \"kab12cd*\" oifname @wb_own drop".to_owned())
        );
        // Cables reach the host at its own addresses and at those of what all share, as before.
        assert_eq!(elements("w4_own"), ["10.77.2.1", "10.77.3.1", "10.77.4.1"]);
        assert_eq!(elements("w6_own"), [""; 0]);
        assert_eq!(
            t.chains["walls_host"].rules,
            ["iifname \"kab12cd*\" jump walls_cables_host", "iifname vmap @walls_at"]
        );
        assert_eq!(
            t.chains["walls_cables_host"].rules,
            ["ct direction reply accept", "ip daddr @w4_own drop", "ip6 daddr @w6_own drop"]
        );
        let host = &t.chains["wh_shared"].rules;
        assert_eq!(host[0], "ip daddr @w4_shared accept");
        assert!(host.contains(&"ip daddr @w4_all drop".to_owned()), "{host:?}");
        // Every set and chain that a rule names is there.
        for rule in t.chains.values().flat_map(|c| &c.rules) {
            for name in rule.split_whitespace().filter_map(|w| w.strip_prefix('@')) {
                assert!(t.sets.contains_key(name), "{rule}");
            }
        }
    }

    /// What people are told is what the rules do.
    #[test]
    fn the_explanation_names_the_wall() {
        use karst_model::{
            firewall::evaluate::{End, Packet, Payload, explain},
            spec::NetworkHost,
        };
        let with_guest = |n: u128, owner| {
            let ipv4 = Some(format!("10.77.{n}.10").parse().unwrap());
            let guest = NetworkHost { mac: format!("02:00:00:00:00:0{n}"), ipv4, ..NetworkHost::default() };
            NetworkSpec { hosts: vec![guest], ..network(n, owner) }
        };
        let passes = |one, two, to: &str| {
            let networks = [with_guest(1, one), with_guest(2, two)];
            let source = "10.77.1.10".parse().unwrap();
            let packet =
                Packet { source, destination: to.parse().unwrap(), payload: Payload::Tcp(50_000, 80) };
            explain(&networks, End::Guest(0, 0), packet).passes
        };
        for to in ["10.77.2.10", "10.77.2.1"] {
            assert!(passes(None, None, to) && passes(Some(7), Some(7), to), "{to}");
            assert!(!passes(None, Some(7), to) && !passes(Some(7), None, to), "{to}");
            assert!(!passes(Some(7), Some(8), to), "{to}");
        }
        assert!(passes(Some(7), Some(8), "10.77.1.1") && passes(Some(7), Some(8), "192.0.2.1"));
    }
}
