//! dnsmasq's lease file, and giving a lease back for a guest that is gone (RFC 2131).

use karst_model::{network::Lease, spec::NetworkHost};
use std::net::{IpAddr, Ipv4Addr};

/// One line of the lease file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    pub mac: String,
    pub address: Ipv4Addr,
}

/// Lease lines that hold at `now` (seconds since 1970): `expiry mac address name client-id`, expiry 0 for ever. Lines of
/// other kinds (`duid …`, DHCPv6) are left out.
pub(crate) fn parse(text: &str, now: u64) -> Vec<Entry> {
    text.lines()
        .filter_map(|line| {
            let mut fields = line.split(' ');
            let expiry: u64 = fields.next()?.parse().ok()?;
            let mac = fields.next()?.to_ascii_lowercase();
            let address = fields.next()?.parse().ok()?;
            (mac.len() == 17 && (expiry == 0 || expiry > now)).then_some(Entry { mac, address })
        })
        .collect()
}

/// Leases as users see them: what was given out, and static addresses, each once. Names come from `hosts` alone, never from
/// what a guest said.
pub(crate) fn merge(entries: &[Entry], hosts: &[NetworkHost]) -> Vec<Lease> {
    let mut leases: Vec<Lease> = hosts
        .iter()
        .filter_map(|h| {
            Some(Lease {
                hostname: h.hostname.clone(),
                mac: h.mac.clone(),
                address: IpAddr::V4(h.ipv4?),
                fixed: true,
            })
        })
        .collect();
    for entry in entries {
        let address = IpAddr::V4(entry.address);
        if leases.iter().any(|l| l.mac == entry.mac && l.address == address) {
            continue;
        }
        let host = hosts.iter().find(|h| h.mac == entry.mac);
        leases.push(Lease {
            hostname: host.map(|h| h.hostname.clone()).unwrap_or_default(),
            mac: entry.mac.clone(),
            address,
            fixed: false,
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
                    0 02:00:00:00:00:03 10.1.2.5 * *\nduid 00:01\nnonsense\n5 x y z\n";
        let entries = parse(text, 100);
        assert_eq!(entries.len(), 2, "{entries:?}");
        let host = |mac: &str, hostname: &str, ipv4: Option<&str>| NetworkHost {
            mac: mac.into(),
            hostname: hostname.into(),
            ipv4: ipv4.map(|a| a.parse().unwrap()),
        };
        let hosts = [
            host("02:00:00:00:00:01", "c1", None),
            host("02:00:00:00:00:03", "v1", Some("10.1.2.5")),
            host("02:00:00:00:00:09", "off", Some("10.1.2.3")),
        ];
        let seen: Vec<_> = merge(&entries, &hosts)
            .iter()
            .map(|l| format!("{} {} {} {}", l.address, l.mac, l.hostname, l.fixed))
            .collect();
        assert_eq!(
            seen,
            [
                "10.1.2.3 02:00:00:00:00:09 off true",
                "10.1.2.5 02:00:00:00:00:03 v1 true",
                "10.1.2.7 02:00:00:00:00:01 c1 false"
            ]
        );
    }
}
