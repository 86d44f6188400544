//! The filters that interfaces can refer to, and what they mean here. Without side effects.
//!
//! They are names for what Karst's firewall does by keys of the interface, so that there is a fixed set of them: those of
//! libvirt's stock filters that it does whole. One that asks for less than it does is bound to more, never to less; one that
//! asks for what it does not do is refused by its name. Their documents say in libvirt's words what is done.

use super::{Element, machine::refuse};
use crate::error::VirError;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use uuid::Uuid;

/// A filter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Filter {
    /// Name.
    pub name: &'static str,
    /// The sender's hardware address is the interface's own.
    pub mac: bool,
    /// The sender's addresses are those that the interface was given; so are those that it announces. Nothing but IP and ARP
    /// passes.
    pub ip: bool,
    /// What it lets pass, of a filter that keeps nothing away.
    allows: Option<&'static str>,
}

/// One that keeps away what is not the interface's own.
const fn keeps(name: &'static str, ip: bool) -> Filter {
    Filter { name, mac: true, ip, allows: None }
}

/// One that only lets pass: nothing is kept away from an interface that refers to it alone, as with libvirt.
const fn allows(name: &'static str, what: &'static str) -> Filter {
    Filter { name, mac: false, ip: false, allows: Some(what) }
}

/// All filters, by name.
pub const FILTERS: [Filter; 18] = [
    allows("allow-arp", "arp"),
    allows("allow-dhcp", "ip"),
    allows("allow-dhcp-server", "ip"),
    allows("allow-dhcpv6", "ipv6"),
    allows("allow-dhcpv6-server", "ipv6"),
    allows("allow-incoming-ipv4", "ip"),
    allows("allow-incoming-ipv6", "ipv6"),
    allows("allow-ipv4", "ip"),
    allows("allow-ipv6", "ipv6"),
    keeps("clean-traffic", true),
    keeps("no-arp-ip-spoofing", true),
    keeps("no-arp-mac-spoofing", false),
    keeps("no-arp-spoofing", true),
    keeps("no-ip-spoofing", true),
    keeps("no-ipv6-spoofing", true),
    keeps("no-mac-spoofing", false),
    allows("qemu-announce-self", "rarp"),
    allows("qemu-announce-self-rarp", "rarp"),
];

/// libvirt's other stock filters, and why they are not there.
const OTHERS: &[(&str, &str)] = &[
    (
        "clean-traffic-gateway",
        "no filter lets an interface reach its gateway's hardware address alone; clean-traffic \
        with <port isolated='yes'/> keeps the guests of a network apart",
    ),
    ("no-ip-multicast", "multicasts are not kept away; rules of networks are ACLs"),
    ("no-ipv6-multicast", "multicasts are not kept away; rules of networks are ACLs"),
    ("no-other-l2-traffic", "it is a part of clean-traffic and is not there apart"),
    ("no-other-rarp-traffic", "it is a part of clean-traffic and is not there apart"),
];

/// Out of it UUIDs of filters are made, the same on every host.
const NAMES: Uuid = Uuid::from_u128(0x5c8f_3b1e_70a4_4d0e_9a57_2f6d_1c0b_4e11);

/// The filter of a name.
pub fn find(name: &str) -> Option<Filter> {
    FILTERS.into_iter().find(|f| f.name == name)
}

/// What an interface refers to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reference {
    /// The filter.
    pub filter: Filter,
    /// The address that is the interface's own.
    pub ipv4: Option<Ipv4Addr>,
    /// The same of IPv6.
    pub ipv6: Option<Ipv6Addr>,
}

/// Reads a `<filterref>`. The addresses that it gives are those that the interface is given on its network.
///
/// # Errors
/// CONFIG_UNSUPPORTED, naming the filter or the parameter.
pub fn reference(e: &Element) -> Result<Reference, VirError> {
    let name = e.attribute("filter").unwrap_or_default();
    let Some(filter) = find(name) else {
        let other = OTHERS.iter().find(|(known, _)| *known == name);
        let why = other.map_or("of your own there are none; rules of networks are ACLs", |(_, why)| *why);
        return Err(refuse("filterref", format!("the filter '{name}' is not there: {why}")));
    };
    let mut found = Reference { filter, ipv4: None, ipv6: None };
    for parameter in e.elements() {
        let of = |name: &str| parameter.attribute(name).unwrap_or_default();
        let (name, value) = (of("name"), of("value"));
        let wrong = |why: &str| Err(refuse("filterref parameter", format!("{name}='{value}': {why}")));
        match (parameter.name(), filter.ip, value.parse::<IpAddr>()) {
            ("parameter", true, Ok(IpAddr::V4(a))) if name == "IP" && found.ipv4.is_none() => {
                found.ipv4 = Some(a)
            }
            ("parameter", true, Ok(IpAddr::V6(a))) if name == "IPV6" && found.ipv6.is_none() => {
                found.ipv6 = Some(a)
            }
            ("parameter", true, _) if matches!(name, "IP" | "IPV6") => {
                return wrong("an interface is given one address of its network, and one of IPv6");
            }
            _ => return wrong("IP and IPV6 are there, of filters that look at addresses"),
        }
    }
    Ok(found)
}

/// What an interface with these keys refers to: what was `kept` of its document when that says the same, else the usual name.
pub fn shown(
    (mac, ip): (bool, bool),
    (ipv4, ipv6): (Option<Ipv4Addr>, Option<Ipv6Addr>),
    kept: Option<&Element>,
) -> Option<Element> {
    let says = |e: &Element| {
        reference(e).is_ok_and(|r| {
            (r.filter.mac, r.filter.ip) == (mac || ip, ip)
                && r.ipv4.is_none_or(|a| Some(a) == ipv4)
                && r.ipv6.is_none_or(|a| Some(a) == ipv6)
        })
    };
    let usual = |name: &str| Element::new("filterref").with("filter", name);
    match kept.filter(|e| says(e)) {
        Some(kept) => Some(kept.clone()),
        None if ip => Some(usual("clean-traffic")),
        None if mac => Some(usual("no-mac-spoofing")),
        None => None,
    }
}

impl Filter {
    /// UUID.
    pub fn uuid(self) -> Uuid {
        Uuid::new_v5(&NAMES, self.name.as_bytes())
    }

    /// The document.
    pub fn document(self) -> String {
        let rule = |action: &str, direction: &str, priority: u32, what: Element| {
            Element::new("rule")
                .with("action", action)
                .with("direction", direction)
                .with("priority", priority)
                .child(what)
        };
        let out = |action: &str, priority: u32, what: Element| rule(action, "out", priority, what);
        let mut e = Element::new("filter").with("name", self.name).with("chain", "root");
        e.push(Element::text("uuid", self.uuid()));
        if let Some(what) = self.allows {
            e.push(rule("accept", "inout", 500, Element::new(what)));
        } else if self.ip {
            e.push(Element::new("filterref").with("filter", "no-mac-spoofing"));
            for (kind, variable) in [("ip", "$IP"), ("ipv6", "$IPV6")] {
                e.push(out("return", 500, Element::new(kind).with("srcipaddr", variable)));
                e.push(out("drop", 600, Element::new(kind)));
            }
            e.push(out("return", 500, Element::new("arp").with("arpsrcipaddr", "$IP")));
            e.push(out("drop", 600, Element::new("arp")));
        } else {
            e.push(out("return", 500, Element::new("mac").with("srcmacaddr", "$MAC")));
            e.push(out("drop", 600, Element::new("mac")));
        }
        e.document()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Code;

    fn of(text: &str) -> Result<Reference, VirError> {
        reference(&crate::xml::read::document(text).unwrap())
    }

    #[test]
    fn filters_refer_to_filters_that_are_there() {
        assert!(FILTERS.windows(2).all(|w| w[0].name < w[1].name));
        for filter in FILTERS {
            let e = crate::xml::read::document(&filter.document()).unwrap();
            assert_eq!(e.find("uuid").map(|u| u.body()), Some(filter.uuid().to_string().as_str()));
            assert!(e.all("filterref").all(|r| r.attribute("filter").is_some_and(|f| find(f).is_some())));
            let drops = e.all("rule").filter(|r| r.attribute("action") == Some("drop")).count();
            assert_eq!(drops > 0, filter.mac || filter.ip, "{}", filter.name);
            assert!(e.all("rule").count() > 0);
        }
        assert_eq!(find("allow-everything"), None);
    }

    #[test]
    fn what_a_filter_would_not_do_is_refused() {
        assert!(OTHERS.iter().all(|(name, _)| find(name).is_none()));
        let parameter = |filter: &str, name: &str, value: &str| {
            of(&format!(
                "<filterref filter='{filter}'><parameter name='{name}' value='{value}'/></filterref>"
            ))
        };
        let given = parameter("clean-traffic", "IP", "10.0.0.9").unwrap();
        assert_eq!(given.ipv4, Some(Ipv4Addr::new(10, 0, 0, 9)));
        assert!(parameter("clean-traffic", "IPV6", "fd00::9").unwrap().ipv6.is_some());
        for (refused, word) in [
            (of("<filterref filter='clean-traffic-gateway'/>"), "isolated"),
            (of("<filterref filter='no-ip-multicast'/>"), "no-ip-multicast"),
            (of("<filterref filter='mine'/>"), "'mine'"),
            (parameter("clean-traffic", "GATEWAY_MAC", "52:54:00:00:00:01"), "GATEWAY_MAC"),
            (parameter("clean-traffic", "IP", "10.0.0.0/24"), "10.0.0.0/24"),
            (parameter("no-mac-spoofing", "IP", "10.0.0.9"), "IP"),
            (parameter("allow-dhcp", "DHCPSERVER", "10.0.0.1"), "DHCPSERVER"),
            (
                of("<filterref filter='clean-traffic'><parameter name='IP' value='10.0.0.9'/>\
                    <parameter name='IP' value='10.0.0.8'/></filterref>"),
                "one address",
            ),
        ] {
            let e = refused.unwrap_err();
            assert!(e.code == Code::ConfigUnsupported && e.text.contains(word), "{e:?}");
        }
    }

    #[test]
    fn what_is_shown_is_what_is_bound() {
        let kept = |text: &str| crate::xml::read::document(text).unwrap();
        let name = |flags: (bool, bool), text: &str| {
            let e = shown(flags, (Some(Ipv4Addr::new(10, 0, 0, 9)), None), Some(&kept(text)))?;
            e.attribute("filter").map(str::to_owned)
        };
        let arp = "<filterref filter='no-arp-spoofing'/>";
        assert_eq!(name((true, true), arp).as_deref(), Some("no-arp-spoofing"));
        // It was changed since.
        assert_eq!(name((true, false), arp).as_deref(), Some("no-mac-spoofing"));
        assert_eq!(name((false, false), arp), None);
        assert_eq!(name((false, false), "<filterref filter='allow-dhcp'/>").as_deref(), Some("allow-dhcp"));
        assert_eq!(
            name((true, true), "<filterref filter='clean-traffic-gateway'/>").as_deref(),
            Some("clean-traffic")
        );
        let with = |ip: &str| {
            format!("<filterref filter='no-ip-spoofing'><parameter name='IP' value='{ip}'/></filterref>")
        };
        assert_eq!(name((false, true), &with("10.0.0.9")).as_deref(), Some("no-ip-spoofing"));
        assert_eq!(name((false, true), &with("10.0.0.8")).as_deref(), Some("clean-traffic"));
        assert_eq!(shown((false, false), (None, None), None), None);
    }
}
