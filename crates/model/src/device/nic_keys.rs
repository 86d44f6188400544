//! What the keys of NICs mean. Which kinds have them says [`super::nic_kind`].

/// Name and text, by name.
pub const NIC_KEYS: &[(&str, &str)] = &[
    ("attached", "`false` leaves it out while it stays described (true)."),
    ("boot.priority", "Virtual machines: the higher, the earlier it is booted from."),
    ("connected", "`false` takes its cable out (true)."),
    ("host_name", "A further name of the host's end."),
    ("hwaddr", "MAC address; one is chosen."),
    (
        "io.bus",
        "Virtual machines: `virtio` (the default), `e1000e`, and of older systems `e1000`, `rtl8139`, `pcnet`, `ne2k_pci`.",
    ),
    (
        "io.options",
        "Virtual machines: what of it is not as usual, a list of `rom=off`, and of `virtio` of `iommu`, `ats`, `packed`, `page-per-queue`, `event-index=off`, `ioeventfd=off`, `tx=loop`, `tx=timer`, `rx-queue-size=`, `rss`, `hash`, and offloads such as `csum=off`; of nictype user `ipv4=10.1.2.0/24` and `ipv6=fd01::/64`.",
    ),
    ("ipv4.address", "Address that the guest always gets; of nictype routed its addresses, comma-separated."),
    ("ipv4.gateway", "`none`: no default route in the guest (auto)."),
    ("ipv4.host_address", "The host's end of the cable (169.254.0.1)."),
    ("ipv4.routes", "Subnets that lead to the guest, comma-separated."),
    ("ipv6.address", "As `ipv4.address`."),
    ("ipv6.gateway", "As `ipv4.gateway`."),
    ("ipv6.host_address", "The host's end of the cable (fe80::1)."),
    ("ipv6.routes", "As `ipv4.routes`."),
    ("limits.egress", "Bits a second that the guest may send, such as `100Mbit`; live."),
    ("limits.egress.burst", "Bytes that may pass at once beyond that, such as `1MiB`."),
    ("limits.egress.peak", "Bits a second that such a burst never exceeds."),
    ("limits.ingress", "Bits a second that it may receive; live."),
    ("limits.ingress.burst", "As `limits.egress.burst`."),
    ("limits.ingress.peak", "As `limits.egress.peak`."),
    ("limits.max", "Both."),
    ("limits.priority", "Priority of what it sends, 0 to 2147483647."),
    ("mtu", "MTU, 68 to 65535; that of the network."),
    ("name", "Name inside a container; that of the device."),
    ("network", "The network it is on; in place of `nictype` and `parent`."),
    ("nictype", "What it is, where no network says it: one of the kinds of this table."),
    (
        "parent",
        "Bridge or interface of the host, which `network_interfaces` of host-policy.toml grants; a bond is one too.",
    ),
    (
        "portgroup",
        "Group of ports of the network whose rates it has, where it says none itself; the network's usual one.",
    ),
    ("queue.tx.length", "Packets that may wait on the host's end."),
    ("security.acls", "ACLs, comma-separated."),
    (
        "security.acls.default.egress.action",
        "For what no rule matches: allow, reject or drop; that of the network.",
    ),
    ("security.acls.default.egress.logged", "Log what no rule matches."),
    (
        "security.acls.default.ingress.action",
        "For what no rule matches: allow, reject or drop; that of the network.",
    ),
    ("security.acls.default.ingress.logged", "Log what no rule matches."),
    ("security.ipv4_filtering", "Drop what it sends under an IPv4 address that is not its own (false)."),
    ("security.ipv6_filtering", "The same of IPv6 (false)."),
    ("security.mac_filtering", "Drop what it sends under a MAC address that is not its own (false)."),
    ("security.port_isolation", "It does not reach others on the bridge that have this too (false)."),
    ("type", "`nic`."),
    (
        "vlan",
        "VLAN 1 to 4094: of what has no tag inside, on a bridge that tells VLANs apart, where `none` drops that; of the parent for the others.",
    ),
    ("vlan.tagged", "VLANs that pass with their tags, such as `5,10-19`."),
];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::nic_kinds;

    #[test]
    fn all_and_no_others() {
        assert!(NIC_KEYS.windows(2).all(|w| w[0].0 < w[1].0));
        let named: Vec<&str> = NIC_KEYS.iter().map(|(k, _)| *k).collect();
        let mut known: Vec<&str> = nic_kinds().flat_map(|(_, keys)| keys).collect();
        known.sort_unstable();
        known.dedup();
        assert_eq!(named, known);
    }
}
