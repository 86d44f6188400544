//! The filters that interfaces can refer to, and what they mean here. Without side effects.
//!
//! They are names for what Karst's firewall does by keys of the interface, so that there is a fixed set of them. Their
//! documents say in libvirt's words what that is.

use super::Element;
use uuid::Uuid;

/// A filter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Filter {
    /// Name.
    pub name: &'static str,
    /// The sender's hardware address is the interface's own.
    pub mac: bool,
    /// The sender's addresses are those that the interface was given; so are those that it announces.
    pub ip: bool,
}

/// All filters, by name.
pub const FILTERS: [Filter; 4] = [
    Filter { name: "clean-traffic", mac: true, ip: true },
    Filter { name: "clean-traffic-gateway", mac: true, ip: true },
    Filter { name: "no-ip-spoofing", mac: true, ip: true },
    Filter { name: "no-mac-spoofing", mac: true, ip: false },
];

/// Out of it UUIDs of filters are made, the same on every host.
const NAMES: Uuid = Uuid::from_u128(0x5c8f_3b1e_70a4_4d0e_9a57_2f6d_1c0b_4e11);

/// The filter of a name.
pub fn find(name: &str) -> Option<Filter> {
    FILTERS.into_iter().find(|f| f.name == name)
}

impl Filter {
    /// UUID.
    pub fn uuid(self) -> Uuid {
        Uuid::new_v5(&NAMES, self.name.as_bytes())
    }

    /// The document.
    pub fn document(self) -> String {
        let rule = |action: &str, priority: u32, what: Element| {
            Element::new("rule")
                .with("action", action)
                .with("direction", "out")
                .with("priority", priority)
                .child(what)
        };
        let mut e = Element::new("filter").with("name", self.name).with("chain", "root");
        e.push(Element::text("uuid", self.uuid()));
        if self.ip {
            e.push(Element::new("filterref").with("filter", "no-mac-spoofing"));
            for (kind, variable) in [("ip", "$IP"), ("ipv6", "$IPV6")] {
                e.push(rule("return", 500, Element::new(kind).with("srcipaddr", variable)));
                e.push(rule("drop", 600, Element::new(kind)));
            }
            e.push(rule("return", 500, Element::new("arp").with("arpsrcipaddr", "$IP")));
            e.push(rule("drop", 600, Element::new("arp")));
        } else {
            e.push(rule("return", 500, Element::new("mac").with("srcmacaddr", "$MAC")));
            e.push(rule("drop", 600, Element::new("mac")));
        }
        e.document()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_refer_to_filters_that_are_there() {
        assert!(FILTERS.windows(2).all(|w| w[0].name < w[1].name));
        for filter in FILTERS {
            let e = crate::xml::read::document(&filter.document()).unwrap();
            assert_eq!(e.find("uuid").map(|u| u.body()), Some(filter.uuid().to_string().as_str()));
            assert!(e.all("filterref").all(|r| r.attribute("filter").is_some_and(|f| find(f).is_some())));
            assert!(e.all("rule").count() >= 2);
        }
        assert_eq!(find("allow-everything"), None);
    }
}
