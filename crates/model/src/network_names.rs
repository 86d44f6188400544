//! What a network's DNS and DHCP answer beside the guests that are known: hosts, texts and services under chosen names, who is asked
//! for other names, and addresses kept for MAC addresses that nobody has yet. Each record is one line of a key's value; what it
//! says becomes configuration of dnsmasq, so nothing is taken that is not a name, a number, an address or printable text.

use crate::{Error, Result, device::parse_mac};
use serde::{Deserialize, Serialize};
use std::net::{IpAddr, Ipv4Addr};

/// Most records of a key.
const MOST: usize = 256;
/// Most bytes of a text and its name as they are written for dnsmasq, which reads lines of 1024 and would not start with a longer one.
const WRITTEN: usize = 1000;

/// An address with its names.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DnsHost {
    /// Address.
    pub address: IpAddr,
    /// Names; at least one.
    pub names: Vec<String>,
}

/// A text under a name (TXT).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DnsText {
    /// Name.
    pub name: String,
    /// Printable ASCII.
    pub value: String,
}

/// Where a service is (SRV, RFC 2782).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DnsService {
    /// Service, without its underscore.
    pub service: String,
    /// Protocol, without its underscore.
    pub protocol: String,
    /// Domain; the network's when absent.
    pub domain: Option<String>,
    /// Host; none says that the service is not there.
    pub target: Option<String>,
    /// Port.
    pub port: Option<u16>,
    /// Priority.
    pub priority: Option<u16>,
    /// Weight.
    pub weight: Option<u16>,
}

/// Who is asked for names that the network does not know.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DnsForwarder {
    /// Only for names in this domain.
    pub domain: Option<String>,
    /// A server; none: whom the host asks.
    pub address: Option<IpAddr>,
}

/// An address that is kept for a MAC address.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReservedHost {
    /// MAC address, lower case.
    pub mac: String,
    /// Address.
    pub address: Ipv4Addr,
    /// Name.
    pub name: Option<String>,
}

/// All of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(default)]
pub struct NetworkNames {
    /// Names of the domain that are not known are asked for elsewhere.
    pub beyond: bool,
    /// Names without a domain are asked for elsewhere; `Some(false)`: not even for other records than addresses.
    pub plain: Option<bool>,
    /// Hosts.
    pub hosts: Vec<DnsHost>,
    /// Texts.
    pub texts: Vec<DnsText>,
    /// Services.
    pub services: Vec<DnsService>,
    /// Forwarders.
    pub forwarders: Vec<DnsForwarder>,
    /// Reserved addresses.
    pub reserved: Vec<ReservedHost>,
}

fn bad(key: &str, text: impl Into<String>) -> Error {
    Error::invalid(format!("config.{key}"), text)
}

/// A name of DNS: labels of letters, digits, hyphens and underscores.
pub fn is_name(text: &str) -> bool {
    let label = |l: &str| {
        (1..=63).contains(&l.len()) && l.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
    };
    text.len() <= 253 && text.split('.').all(label)
}

fn is_label(text: &str) -> bool {
    is_name(text) && !text.contains('.')
}

/// Printable, and not changed by who cuts the space around it off.
fn is_text(text: &str) -> bool {
    !text.is_empty()
        && text.bytes().all(|b| (b' '..=b'~').contains(&b))
        && text.trim_matches(' ').len() == text.len()
}

impl DnsHost {
    fn parse(entry: &str) -> Option<Self> {
        let mut words = entry.split_whitespace();
        let address = words.next()?.parse().ok()?;
        let names: Vec<String> = words.map(str::to_owned).collect();
        (!names.is_empty() && names.iter().all(|n| is_name(n))).then_some(Self { address, names })
    }

    /// As a key has it.
    pub fn entry(&self) -> String {
        format!("{} {}", self.address, self.names.join(" "))
    }
}

impl DnsText {
    fn parse(entry: &str) -> Option<Self> {
        let (name, value) = entry.split_once(' ')?;
        // Two characters are written with another before them.
        let written = name.len() + value.len() + value.bytes().filter(|b| matches!(b, b'"' | b'\\')).count();
        let fits = is_name(name) && is_text(value) && written <= WRITTEN;
        fits.then(|| Self { name: name.into(), value: value.into() })
    }

    /// As a key has it.
    pub fn entry(&self) -> String {
        format!("{} {}", self.name, self.value)
    }
}

impl DnsService {
    fn parse(entry: &str) -> Option<Self> {
        let words: Vec<&str> = entry.split_whitespace().collect();
        let (first, rest) = words.split_at_checked(2)?;
        let said = |n: usize| rest.get(n).copied().filter(|w| *w != "-");
        let number = |n: usize| said(n).map(str::parse::<u16>).transpose().ok();
        let named = |n: usize| match said(n) {
            Some(name) if !is_name(name) => None,
            name => Some(name.map(str::to_owned)),
        };
        let service = Self {
            service: first[0].into(),
            protocol: first[1].into(),
            domain: named(0)?,
            target: named(1)?,
            port: number(2)?,
            priority: number(3)?,
            weight: number(4)?,
        };
        let numbers = service.port.or(service.priority).or(service.weight);
        let fits = first.iter().all(|w| is_label(w))
            && rest.len() <= 5
            && service.port != Some(0)
            && (service.target.is_some() || numbers.is_none());
        fits.then_some(service)
    }

    /// As a key has it.
    pub fn entry(&self) -> String {
        let text = |t: &Option<String>| t.clone().unwrap_or_else(|| "-".into());
        let number = |n: Option<u16>| n.map_or("-".into(), |n| n.to_string());
        let all = [
            self.service.clone(),
            self.protocol.clone(),
            text(&self.domain),
            text(&self.target),
            number(self.port),
            number(self.priority),
            number(self.weight),
        ];
        all.join(" ").trim_end_matches(" -").to_owned()
    }
}

impl DnsForwarder {
    fn parse(entry: &str) -> Option<Self> {
        let (domain, address) = match entry.split_once('=') {
            None => (None, entry),
            Some((domain, address)) => (Some(domain.trim()), address.trim()),
        };
        let address = match address {
            "" => None,
            address => Some(address.parse().ok()?),
        };
        let fits = domain.is_none_or(is_name) && (domain.is_some() || address.is_some());
        fits.then(|| Self { domain: domain.map(str::to_owned), address })
    }

    /// As a key has it.
    pub fn entry(&self) -> String {
        let address = self.address.map(|a| a.to_string()).unwrap_or_default();
        match &self.domain {
            None => address,
            Some(domain) => format!("{domain}={address}"),
        }
    }
}

impl ReservedHost {
    fn parse(entry: &str) -> Option<Self> {
        let words: Vec<&str> = entry.split_whitespace().collect();
        let (mac, address, name) = match words[..] {
            [mac, address] => (mac, address, None),
            [mac, address, name] => (mac, address, Some(name)),
            _ => return None,
        };
        let mac = parse_mac("config.ipv4.dhcp.hosts", mac).ok()?.to_ascii_lowercase();
        // It is a guest's name, which is a label without underscores.
        let is = |n: &str| is_label(n) && !n.contains('_') && !n.starts_with('-') && !n.ends_with('-');
        let address = address.parse().ok()?;
        name.is_none_or(is).then(|| Self { mac, address, name: name.map(str::to_owned) })
    }

    /// As a key has it.
    pub fn entry(&self) -> String {
        let name = self.name.as_ref().map(|n| format!(" {n}")).unwrap_or_default();
        format!("{} {}{name}", self.mac, self.address)
    }
}

/// Entries of a value, one a line or, where none of them can contain one, between commas.
fn entries(value: &str, commas: bool) -> impl Iterator<Item = &str> {
    let between = move |c: char| c == '\n' || commas && c == ',';
    value.split(between).map(str::trim).filter(|e| !e.is_empty())
}

fn parsed<T>(
    key: &str,
    value: Option<&str>,
    form: &str,
    parse: impl Fn(&str) -> Option<T>,
) -> Result<Vec<T>> {
    let wrong = |entry: &str| bad(key, format!("{entry:?} is not {form}"));
    let all: Vec<T> = entries(value.unwrap_or_default(), key != "dns.txt")
        .map(|entry| parse(entry).ok_or_else(|| wrong(entry)))
        .collect::<Result<_>>()?;
    match all.len() {
        n if n > MOST => Err(bad(key, format!("{n} records are more than {MOST}"))),
        _ => Ok(all),
    }
}

impl NetworkNames {
    /// Nothing that one would have to say.
    pub fn is_usual(&self) -> bool {
        *self == Self::default()
    }

    /// Is there something that a server of names answers?
    pub fn has_records(&self) -> bool {
        !(self.hosts.is_empty()
            && self.texts.is_empty()
            && self.services.is_empty()
            && self.forwarders.is_empty())
    }

    /// Of the values of keys; `local` and `plain` are `dns.local` and `dns.plain`.
    ///
    /// # Errors
    /// Invalid, naming the key.
    pub fn parse<'a>(
        get: &dyn Fn(&str) -> Option<&'a str>,
        local: bool,
        plain: Option<bool>,
    ) -> Result<Self> {
        let hosts = "a host ADDRESS NAME [NAME…]";
        let texts = "a text NAME VALUE of printable characters, both of 1000 bytes at most with quotes and backslashes counted twice";
        let services =
            "a service SERVICE PROTOCOL [DOMAIN [TARGET [PORT [PRIORITY [WEIGHT]]]]], where - is none";
        let forwarders = "a forwarder ADDRESS, DOMAIN=ADDRESS or DOMAIN=";
        let reserved = "a reserved address MAC ADDRESS [NAME]";
        let names = Self {
            beyond: !local,
            plain,
            hosts: parsed("dns.hosts", get("dns.hosts"), hosts, DnsHost::parse)?,
            texts: parsed("dns.txt", get("dns.txt"), texts, DnsText::parse)?,
            services: parsed("dns.srv", get("dns.srv"), services, DnsService::parse)?,
            forwarders: parsed("dns.forwarders", get("dns.forwarders"), forwarders, DnsForwarder::parse)?,
            reserved: parsed("ipv4.dhcp.hosts", get("ipv4.dhcp.hosts"), reserved, ReservedHost::parse)?,
        };
        for (n, one) in names.reserved.iter().enumerate() {
            let twice = |o: &ReservedHost| {
                o.mac == one.mac || o.address == one.address || o.name.is_some() && o.name == one.name
            };
            if names.reserved[..n].iter().any(twice) {
                return Err(bad("ipv4.dhcp.hosts", format!("{:?} is said twice", one.entry())));
            }
        }
        Ok(names)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    fn parse(pairs: &[(&'static str, &'static str)]) -> Result<NetworkNames> {
        let all: BTreeMap<&str, &'static str> = pairs.iter().copied().collect();
        NetworkNames::parse(&|key: &str| all.get(key).copied(), true, None)
    }

    #[test]
    fn records_are_read_and_written() {
        let names = parse(&[
            ("dns.hosts", "10.0.0.5 www www.example.org, fd00::5 six"),
            ("dns.txt", "spf v=spf1 a, b \"c\\\nother x"),
            ("dns.srv", "ldap tcp example.org ldap.example.org 389 10 5,sip udp,xmpp tcp - chat.example.org"),
            ("dns.forwarders", "192.0.2.53, example.org=192.0.2.54,host.example="),
            ("ipv4.dhcp.hosts", "52:54:00:AA:BB:01 10.0.0.9 db,52:54:00:aa:bb:02 10.0.0.10"),
        ])
        .unwrap();
        assert!(names.has_records() && !names.is_usual());
        let entries: Vec<String> = names.services.iter().map(DnsService::entry).collect();
        let wanted =
            ["ldap tcp example.org ldap.example.org 389 10 5", "sip udp", "xmpp tcp - chat.example.org"];
        assert_eq!(entries, wanted);
        assert_eq!(names.hosts[0].entry(), "10.0.0.5 www www.example.org");
        assert_eq!(names.texts[0].value, "v=spf1 a, b \"c\\");
        let entries: Vec<String> = names.forwarders.iter().map(DnsForwarder::entry).collect();
        assert_eq!(entries, ["192.0.2.53", "example.org=192.0.2.54", "host.example="]);
        assert_eq!(names.reserved[0].entry(), "52:54:00:aa:bb:01 10.0.0.9 db");
        assert!(parse(&[]).unwrap().is_usual());
    }

    #[test]
    fn nothing_else_reaches_a_server_of_names() {
        let text_of = |letter: &str, count: usize| -> &'static str {
            Box::leak(format!("name {}", letter.repeat(count)).into_boxed_str())
        };
        let (text, quotes, slashes) = (text_of("x", 997), text_of("\"", 499), text_of("\\", 499));
        for fits in [text_of("x", 996), text_of("\"", 498), text_of("\\", 498)] {
            assert!(parse(&[("dns.txt", fits)]).is_ok(), "{fits}");
        }
        let many: &'static str = Box::leak(vec!["10.0.0.5 www"; 257].join(",").into_boxed_str());
        let cases: &[(&'static str, &'static str)] = &[
            ("dns.hosts", "10.0.0.5"),
            ("dns.hosts", "www 10.0.0.5"),
            ("dns.hosts", "10.0.0.5 a/b"),
            ("dns.hosts", "10.0.0.5 a#b"),
            ("dns.hosts", many),
            ("dns.txt", "name"),
            ("dns.txt", "na,me value"),
            ("dns.txt", "name val\tue"),
            ("dns.txt", "name v\u{e4}lue"),
            ("dns.txt", text),
            ("dns.txt", quotes),
            ("dns.txt", slashes),
            ("dns.srv", "ldap"),
            ("dns.srv", "_l.dap tcp"),
            ("dns.srv", "ldap tcp example.org t 0"),
            ("dns.srv", "ldap tcp example.org - 389"),
            ("dns.srv", "ldap tcp example.org t 70000"),
            ("dns.srv", "ldap tcp a b 1 2 3 4"),
            ("dns.forwarders", "ns.example.org"),
            ("dns.forwarders", "="),
            ("dns.forwarders", "a/b=192.0.2.1"),
            ("dns.forwarders", "192.0.2.1#53"),
            ("ipv4.dhcp.hosts", "52:54:00:aa:bb:01"),
            ("ipv4.dhcp.hosts", "x 10.0.0.9"),
            ("ipv4.dhcp.hosts", "52:54:00:aa:bb:01 10.0.0.9 a_b"),
            ("ipv4.dhcp.hosts", "52:54:00:aa:bb:01 10.0.0.9,52:54:00:aa:bb:01 10.0.0.10"),
            ("ipv4.dhcp.hosts", "52:54:00:aa:bb:01 10.0.0.9,52:54:00:aa:bb:02 10.0.0.9"),
        ];
        for (key, value) in cases {
            let e = parse(&[(*key, *value)]).expect_err(value);
            assert_eq!(e.field, Some(format!("config.{key}")), "{key}={value}");
        }
    }
}
