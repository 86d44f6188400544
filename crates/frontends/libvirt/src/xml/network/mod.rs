//! Networks as XML.

use super::Element;
use karst_model::{Result, network::Network};

/// The document of a network.
///
/// # Errors
/// Invalid, when its configuration is.
pub fn document(network: &Network) -> Result<String> {
    let spec = network.bridge()?;
    let mut e = Element::new("network")
        .child(Element::text("name", &network.name))
        .child(Element::text("uuid", network.id));
    // Routed without translation is libvirt's "route"; neither is an isolated network.
    if spec.nat || spec.nat6 {
        let mut forward = Element::new("forward").with("mode", "nat");
        if spec.nat6 {
            forward.push(Element::new("nat").with("ipv6", "yes"));
        }
        e.push(forward);
    } else if spec.routing || spec.routing6 {
        e.push(Element::new("forward").with("mode", "route"));
    }
    e.push(Element::new("bridge").with("name", &network.name).with("stp", "off").with("delay", 0));
    if let Some(mtu) = spec.mtu {
        e.push(Element::new("mtu").with("size", mtu));
    }
    if let Some(mac) = &spec.hwaddr {
        e.push(Element::new("mac").with("address", mac));
    }
    if !spec.domain.is_empty() {
        e.push(Element::new("domain").with("name", &spec.domain).with("localOnly", "yes"));
    }
    if let Some(net) = spec.ipv4 {
        let mut ip = Element::new("ip").with("address", net.addr()).with("netmask", net.netmask());
        if spec.dhcp {
            let ranges = match spec.dhcp_ranges.is_empty() {
                true => whole(net).into_iter().collect(),
                false => spec.dhcp_ranges.clone(),
            };
            ip.push(
                Element::new("dhcp").children(
                    ranges.iter().map(|(a, b)| Element::new("range").with("start", a).with("end", b)),
                ),
            );
        }
        e.push(ip);
    }
    if let Some(net) = spec.ipv6 {
        let ip = Element::new("ip").with("family", "ipv6").with("address", net.addr());
        e.push(ip.with("prefix", net.prefix_len()));
    }
    Ok(e.document())
}

/// The hosts of a subnet, first and last, without the bridge at its beginning.
fn whole(net: ipnet::Ipv4Net) -> Option<(std::net::Ipv4Addr, std::net::Ipv4Addr)> {
    let others = || net.hosts().filter(|a| *a != net.addr());
    Some((others().next()?, net.hosts().next_back().filter(|a| *a != net.addr())?))
}
