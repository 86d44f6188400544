//! Addresses that a network keeps for MAC addresses, guest or none.

use karst_model::{network::BridgeSpec, spec::NetworkHost};

/// Gives a guest the address that is kept for its MAC address, where it has no other, and tells the host of those that nobody has
/// yet. What a guest was given by itself is never taken from it: neither its address nor its name.
pub(super) fn reserve(spec: &BridgeSpec, hosts: &mut Vec<NetworkHost>) {
    for kept in &spec.names.reserved {
        if hosts.iter().any(|h| h.ipv4 == Some(kept.address)) {
            continue;
        }
        if let Some(guest) = hosts.iter_mut().find(|h| h.mac.eq_ignore_ascii_case(&kept.mac)) {
            guest.ipv4.get_or_insert(kept.address);
            continue;
        }
        let taken = |name: &str| hosts.iter().any(|h| h.hostname.eq_ignore_ascii_case(name));
        let hostname = kept.name.clone().filter(|name| !taken(name)).unwrap_or_default();
        let ipv4 = Some(kept.address);
        hosts.push(NetworkHost { mac: kept.mac.clone(), hostname, ipv4, ..Default::default() });
    }
    hosts.sort();
}

#[cfg(test)]
mod tests {
    use super::*;
    use karst_model::Config;

    #[test]
    fn guests_come_first() {
        let keys = [
            ("ipv4.address", "10.0.0.1/24"),
            (
                "ipv4.dhcp.hosts",
                "02:00:00:00:00:01 10.0.0.9 a,02:00:00:00:00:02 10.0.0.10,02:00:00:00:00:03 10.0.0.11 web,02:00:00:00:00:04 10.0.0.12 db",
            ),
        ];
        let config: Config = keys.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
        let spec = BridgeSpec::parse("br0", &config).unwrap();
        let host = |n: u8, name: &str, ipv4: Option<&str>| NetworkHost {
            mac: format!("02:00:00:00:00:0{n}"),
            hostname: name.into(),
            ipv4: ipv4.map(|a| a.parse().unwrap()),
            ..Default::default()
        };
        let mut hosts = vec![
            host(1, "web", None),
            host(2, "fixed", Some("10.0.0.50")),
            host(7, "other", Some("10.0.0.12")),
        ];
        reserve(&spec, &mut hosts);
        let seen: Vec<String> = hosts
            .iter()
            .map(|h| format!("{} {} {}", h.mac, h.hostname, h.ipv4.map_or("-".into(), |a| a.to_string())))
            .collect();
        assert_eq!(
            seen,
            [
                "02:00:00:00:00:01 web 10.0.0.9",
                "02:00:00:00:00:02 fixed 10.0.0.50",
                "02:00:00:00:00:03  10.0.0.11",
                "02:00:00:00:00:07 other 10.0.0.12",
            ]
        );
    }
}
