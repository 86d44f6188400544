//! dnsmasq's lease file, and giving a lease back for a guest that is gone (RFC 2131).

use karst_model::{
    network::{BridgeSpec, Lease, eui64},
    spec::NetworkHost,
};
use std::net::{IpAddr, Ipv4Addr};

/// One line of the lease file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    pub mac: String,
    pub address: IpAddr,
    /// Seconds since 1970; none of one that never ends.
    pub expires: Option<i64>,
}

/// Lease lines that hold at `now` (seconds since 1970): `expiry mac address name client-id`, expiry 0 for ever; of DHCPv6
/// `expiry iaid address name duid`, where the MAC address is the end of the usual kinds of DUID. Other lines are left out.
pub(crate) fn parse(text: &str, now: u64) -> Vec<Entry> {
    text.lines()
        .filter_map(|line| {
            let fields: Vec<&str> = line.split(' ').collect();
            let [expiry, mac, address, _, id, ..] = fields[..] else { return None };
            let expiry: u64 = expiry.parse().ok()?;
            let address: IpAddr = address.parse().ok()?;
            let mac = match address {
                IpAddr::V4(_) => mac,
                // Link-layer address, with time or without (RFC 8415, 11.2 and 11.4).
                IpAddr::V6(_) if id.starts_with("00:01:") || id.starts_with("00:03:") => {
                    id.get(id.len().checked_sub(17)?..)?
                }
                IpAddr::V6(_) => return None,
            };
            let mac = mac.to_ascii_lowercase();
            let expires = (expiry != 0).then(|| i64::try_from(expiry).unwrap_or(i64::MAX));
            (mac.len() == 17 && (expiry == 0 || expiry > now)).then_some(Entry { mac, address, expires })
        })
        .collect()
}

/// Leases as users see them: what was given out, static addresses, and those that guests make themselves of their MAC
/// address; each once. Names come from `hosts` alone, never from what a guest said.
pub(crate) fn merge(entries: &[Entry], spec: &BridgeSpec, hosts: &[NetworkHost]) -> Vec<Lease> {
    let mut leases: Vec<Lease> = vec![];
    for host in hosts {
        let fixed = [host.ipv4.map(IpAddr::V4), host.ipv6.map(IpAddr::V6)];
        let own = spec.ipv6.filter(|_| spec.slaac() && host.ipv6.is_none()).and_then(|n| eui64(n, &host.mac));
        let all = fixed.into_iter().flatten().map(|a| (a, true)).chain(own.map(|a| (IpAddr::V6(a), false)));
        let leased = |address: IpAddr| entries.iter().find(|e| e.mac == host.mac && e.address == address);
        leases.extend(all.map(|(address, fixed)| Lease {
            hostname: host.hostname.clone(),
            mac: host.mac.clone(),
            address,
            fixed,
            expires: leased(address).and_then(|e| e.expires),
        }));
    }
    for entry in entries {
        if leases.iter().any(|l| l.mac == entry.mac && l.address == entry.address) {
            continue;
        }
        let host = hosts.iter().find(|h| h.mac == entry.mac);
        leases.push(Lease {
            hostname: host.map(|h| h.hostname.clone()).unwrap_or_default(),
            mac: entry.mac.clone(),
            address: entry.address,
            fixed: false,
            expires: entry.expires,
        });
    }
    leases.sort_by_key(|l| l.address);
    leases
}

/// A DHCPRELEASE of `address` by `mac`, addressed to `server`. dnsmasq tells guests by MAC (`dhcp-ignore-clid`), so none of
/// their own identifiers is needed.
pub(crate) fn release(mac: [u8; 6], address: Ipv4Addr, server: Ipv4Addr, transaction: u32) -> Vec<u8> {
    let mut packet = vec![0u8; 240];
    packet[..4].copy_from_slice(&[1, 1, 6, 0]); // request, Ethernet, 6-byte addresses, no relay
    packet[4..8].copy_from_slice(&transaction.to_be_bytes());
    packet[12..16].copy_from_slice(&address.octets()); // ciaddr
    packet[28..34].copy_from_slice(&mac); // chaddr
    packet[236..240].copy_from_slice(&[99, 130, 83, 99]); // magic cookie
    packet.extend_from_slice(&[53, 1, 7]); // message type: release
    packet.extend_from_slice(&[54, 4]); // server identifier
    packet.extend_from_slice(&server.octets());
    packet.push(255);
    packet
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leases_are_read_and_named_by_us() {
        let text = "1000 02:00:00:00:00:01 10.1.2.7 evil 01:02\n99 02:00:00:00:00:02 10.1.2.8 * *\n\
                    0 02:00:00:00:00:03 10.1.2.5 * *\nduid 00:01\nnonsense\n5 x y z\n\
                    0 77 fd42::9 * 00:01:00:01:2c:aa:bb:cc:02:00:00:00:00:03\n0 78 fd42::a * 00:02:00:01\n";
        let entries = parse(text, 100);
        assert_eq!(entries.len(), 3, "{entries:?}");
        let host = |mac: &str, hostname: &str, ipv4: Option<&str>| NetworkHost {
            mac: mac.into(),
            hostname: hostname.into(),
            ipv4: ipv4.map(|a| a.parse().unwrap()),
            ..Default::default()
        };
        let hosts = [
            host("02:00:00:00:00:01", "c1", None),
            host("02:00:00:00:00:03", "v1", Some("10.1.2.5")),
            host("02:00:00:00:00:09", "off", Some("10.1.2.3")),
        ];
        let seen: Vec<_> = merge(&entries, &BridgeSpec::default(), &hosts)
            .iter()
            .map(|l| format!("{} {} {} {} {:?}", l.address, l.mac, l.hostname, l.fixed, l.expires))
            .collect();
        assert_eq!(
            seen,
            [
                "10.1.2.3 02:00:00:00:00:09 off true None",
                "10.1.2.5 02:00:00:00:00:03 v1 true None",
                "10.1.2.7 02:00:00:00:00:01 c1 false Some(1000)",
                "fd42::9 02:00:00:00:00:03 v1 false None"
            ]
        );
    }
}
