//! Rates that ports have of their network's groups.

use karst_model::{network::BridgeSpec, network_ports::Rate, spec::NetworkHost};

/// Gives ports without a rate of their own, direction by direction, that of the group that they name, or of the network's usual one. A
/// group that is gone says nothing.
pub(super) fn settle(spec: &BridgeSpec, hosts: &mut [NetworkHost]) {
    for port in hosts.iter_mut().filter_map(|h| h.port.as_mut()) {
        let named = port.group.take();
        let Some(group) = spec.ports.group(named.as_deref()) else { continue };
        if let (None, Some(Rate { average, more })) = (port.ingress_limit, group.rates.ingress) {
            (port.ingress_limit, port.ingress) = (Some(average), more);
        }
        if let (None, Some(Rate { average, more })) = (port.egress_limit, group.rates.egress) {
            (port.egress_limit, port.egress) = (Some(average), more);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use karst_model::{Config, spec::PortSpec};

    #[test]
    fn what_a_port_says_itself_comes_first() {
        let keys = [
            ("ipv4.address", "10.0.0.1/24"),
            ("portgroup.fast.limits.ingress", "100Mbit"),
            ("portgroup.slow.default", "true"),
            ("portgroup.slow.limits.ingress", "1Mbit"),
            ("portgroup.slow.limits.egress", "2Mbit"),
        ];
        let config: Config = keys.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
        let spec = BridgeSpec::parse("br0", &config).unwrap();
        let host = |group: Option<&str>, ingress_limit: Option<u64>| NetworkHost {
            port: Some(PortSpec { group: group.map(str::to_owned), ingress_limit, ..Default::default() }),
            ..Default::default()
        };
        let mut hosts =
            [host(Some("fast"), None), host(None, None), host(None, Some(9)), host(Some("gone"), None)];
        settle(&spec, &mut hosts);
        let seen: Vec<_> = hosts.iter().map(|h| h.port.clone().unwrap()).collect();
        let rates: Vec<_> = seen.iter().map(|p| (p.ingress_limit, p.egress_limit)).collect();
        let wanted = [
            (Some(100_000_000), None),
            (Some(1_000_000), Some(2_000_000)),
            (Some(9), Some(2_000_000)),
            (None, None),
        ];
        assert_eq!(rates, wanted);
        assert!(seen.iter().all(|p| p.group.is_none()), "a host knows no groups");
    }
}
