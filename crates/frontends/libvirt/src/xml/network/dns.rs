//! `<dns>` of networks as keys, and back. A record becomes one line of a key's value: what would be more than one, or another one
//! when it is read again, is refused here.

use crate::{
    error::VirError,
    xml::{
        Element,
        machine::{refuse, wrong},
    },
};
use karst_model::{
    Config, Result as Parsed,
    network::{BridgeSpec, DnsMode},
    network_names::{DnsForwarder, DnsHost, DnsService, DnsText, NetworkNames},
};
use std::net::IpAddr;

/// Lists of records, each with what stands between its entries.
pub const LISTS: [(&str, &str); 4] =
    [("dns.forwarders", ","), ("dns.hosts", ","), ("dns.srv", ","), ("dns.txt", "\n")];

/// The records that a configuration has.
///
/// # Errors
/// Those of the keys.
pub fn names(config: &Config) -> Parsed<NetworkNames> {
    NetworkNames::parse(&|key| config.get(key).map(String::as_str), true, None)
}

/// An entry of a key, if it is one.
fn sound(key: &'static str, entry: String, what: &str) -> Result<String, VirError> {
    let config = Config::from([(key.to_owned(), entry.clone())]);
    let again = names(&config).map(|names| -> Vec<String> {
        match key {
            "dns.forwarders" => names.forwarders.iter().map(DnsForwarder::entry).collect(),
            "dns.hosts" => names.hosts.iter().map(DnsHost::entry).collect(),
            "dns.srv" => names.services.iter().map(DnsService::entry).collect(),
            _ => names.texts.iter().map(DnsText::entry).collect(),
        }
    });
    match again {
        Ok(all) if all.len() == 1 && all[0] == entry => Ok(entry),
        _ => Err(wrong(format!("{what} has characters, or a length, that no record of DNS has here"))),
    }
}

fn address(e: &Element, name: &str) -> Result<Option<IpAddr>, VirError> {
    let invalid = |_| wrong(format!("Invalid IP address in DNS {} record", e.name().to_uppercase()));
    e.attribute(name).map(str::parse).transpose().map_err(invalid)
}

/// `<host>`: what it says, of which a part may be missing.
///
/// # Errors
/// XML error.
pub fn host(e: &Element, partial: bool) -> Result<(Option<IpAddr>, Vec<String>), VirError> {
    let address = address(e, "ip")?;
    let names: Vec<String> = e.all("hostname").map(|n| n.body().trim().to_owned()).collect();
    if names.iter().any(String::is_empty) || names.is_empty() && (!partial || address.is_none()) {
        return Err(wrong("Missing hostname in DNS HOST record"));
    }
    if address.is_none() && !partial {
        return Err(wrong("Missing IP address in DNS HOST record"));
    }
    Ok((address, names))
}

/// `<host>` as an entry of `dns.hosts`.
///
/// # Errors
/// XML error.
pub fn host_entry(e: &Element) -> Result<String, VirError> {
    let (address, names) = host(e, false)?;
    let address = address.ok_or_else(|| wrong("Missing IP address in DNS HOST record"))?;
    sound("dns.hosts", DnsHost { address, names }.entry(), "a DNS HOST record")
}

/// `<txt>` as an entry of `dns.txt`.
///
/// # Errors
/// XML error.
pub fn text_entry(e: &Element) -> Result<String, VirError> {
    let attribute = |name: &str| {
        let missing = || wrong(format!("missing required {name} attribute in DNS TXT record"));
        e.attribute(name).map(str::to_owned).ok_or_else(missing)
    };
    let record = DnsText { name: attribute("name")?, value: attribute("value")? };
    // The entry has a blank between both.
    if record.name.contains(char::is_whitespace) {
        return Err(wrong(format!("prohibited whitespace in DNS TXT record name '{}'", record.name)));
    }
    sound("dns.txt", record.entry(), "a DNS TXT record")
}

/// `<srv>`, of which all may be missing but for one that is added.
///
/// # Errors
/// XML error.
pub fn service(e: &Element, partial: bool) -> Result<(Option<String>, Option<String>, DnsService), VirError> {
    let text = |name: &str| e.attribute(name).map(str::to_owned);
    let required = |name: &str| match text(name) {
        None if !partial => Err(wrong(format!("missing required {name} attribute in DNS SRV record"))),
        found => Ok(found),
    };
    let number = |name: &str, least: u16| -> Result<Option<u16>, VirError> {
        let Some(said) = e.attribute(name) else { return Ok(None) };
        let found = said.parse().ok().filter(|n: &u16| *n >= least);
        found.map(Some).ok_or_else(|| wrong(format!("invalid DNS SRV {name} attribute")))
    };
    let (named, protocol) = (required("service")?, required("protocol")?);
    let record = DnsService {
        service: named.clone().unwrap_or_default(),
        protocol: protocol.clone().unwrap_or_default(),
        domain: text("domain"),
        // "." says that the service is not there, which is what no target says.
        target: text("target").filter(|t| t != "."),
        port: number("port", 1)?,
        priority: number("priority", 0)?,
        weight: number("weight", 0)?,
    };
    if e.attribute("target").is_none()
        && let Some(name) = ["port", "priority", "weight"].into_iter().find(|n| e.attribute(n).is_some())
    {
        return Err(wrong(format!("DNS SRV {name} attribute not permitted without target")));
    }
    Ok((named, protocol, record))
}

/// `<srv>` as an entry of `dns.srv`.
///
/// # Errors
/// XML error.
pub fn service_entry(e: &Element) -> Result<String, VirError> {
    let (_, _, record) = service(e, false)?;
    sound("dns.srv", record.entry(), "a DNS SRV record")
}

fn forwarder_entry(e: &Element) -> Result<String, VirError> {
    let domain = e.attribute("domain").map(str::to_owned);
    let address = e
        .attribute("addr")
        .map(|a| a.parse::<IpAddr>().map_err(|_| wrong(format!("Invalid forwarder IP address '{a}'"))));
    let record = DnsForwarder { domain, address: address.transpose()? };
    if record.domain.is_none() && record.address.is_none() {
        return Err(wrong("Invalid forwarder element, must contain at least one of addr or domain"));
    }
    sound("dns.forwarders", record.entry(), "a forwarder")
}

/// Puts a list of entries into a configuration.
pub fn put(config: &mut Config, key: &'static str, all: &[String]) {
    let between = LISTS.iter().find(|(k, _)| *k == key).map_or(",", |(_, between)| *between);
    match all.is_empty() {
        true => drop(config.remove(key)),
        false => drop(config.insert(key.into(), all.join(between))),
    }
}

/// `<dns>` of a document, as keys.
///
/// # Errors
/// XML error; unsupported for what has no key.
pub fn read(e: &Element, config: &mut Config) -> Result<(), VirError> {
    let enabled = e.attribute("enable") != Some("no");
    if !enabled {
        config.insert("dns.mode".into(), "none".into());
    }
    match e.attribute("forwardPlainNames") {
        None => {}
        Some(said @ ("yes" | "no")) => {
            config.insert("dns.plain".into(), (said == "yes").to_string());
        }
        Some(other) => {
            return Err(wrong(format!("forwardPlainNames of <dns> is neither yes nor no: '{other}'")));
        }
    }
    let (mut forwarders, mut hosts, mut texts, mut services) = (vec![], vec![], vec![], vec![]);
    for child in e.elements() {
        match child.name() {
            "forwarder" => forwarders.push(forwarder_entry(child)?),
            "host" => hosts.push(host_entry(child)?),
            "txt" => texts.push(text_entry(child)?),
            "srv" => services.push(service_entry(child)?),
            other => return Err(refuse(&format!("dns {other}"), "a network's names have none of it here")),
        }
    }
    if !enabled && !e.elements().is_empty() {
        return Err(wrong("Extra data in disabled network"));
    }
    put(config, "dns.forwarders", &forwarders);
    put(config, "dns.hosts", &hosts);
    put(config, "dns.txt", &texts);
    put(config, "dns.srv", &services);
    Ok(())
}

/// `<dns>` of a network; none where there is nothing to say.
pub fn written(spec: &BridgeSpec) -> Option<Element> {
    let names = &spec.names;
    let off = spec.dns_mode == DnsMode::None;
    let plain = names.plain.map(|plain| if plain { "yes" } else { "no" });
    if !off && plain.is_none() && !names.has_records() {
        return None;
    }
    let e =
        Element::new("dns").with_some("enable", off.then_some("no")).with_some("forwardPlainNames", plain);
    let forwarders = names.forwarders.iter().map(|f| {
        Element::new("forwarder").with_some("domain", f.domain.as_ref()).with_some("addr", f.address)
    });
    let texts = names.texts.iter().map(|t| Element::new("txt").with("name", &t.name).with("value", &t.value));
    let services = names.services.iter().map(|s| {
        let e = Element::new("srv").with("service", &s.service).with("protocol", &s.protocol);
        let e = e.with_some("domain", s.domain.as_ref()).with_some("target", s.target.as_ref());
        let e = e.with_some("port", s.port).with_some("priority", s.priority.filter(|n| *n > 0));
        e.with_some("weight", s.weight.filter(|n| *n > 0))
    });
    let hosts = names.hosts.iter().map(|h| {
        let names = h.names.iter().map(|n| Element::text("hostname", n));
        Element::new("host").with("ip", h.address).children(names)
    });
    Some(e.children(forwarders).children(texts).children(services).children(hosts))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{error::Code, xml::read::document};

    const ALL: &str = "<dns forwardPlainNames='no'>\
        <forwarder addr='192.0.2.53'/><forwarder domain='example.org' addr='192.0.2.54'/><forwarder domain='host.example'/>\
        <txt name='spf' value='v=spf1 a, b'/>\
        <srv service='ldap' protocol='tcp' domain='example.org' target='ldap.example.org' port='389' priority='10' weight='5'/>\
        <srv service='sip' protocol='udp'/>\
        <host ip='10.0.0.5'><hostname>www</hostname><hostname>a.example</hostname></host></dns>";

    #[test]
    fn records_come_back_as_they_were() {
        let mut config = Config::from([("ipv4.address".to_owned(), "10.0.0.1/24".to_owned())]);
        read(&document(ALL).unwrap(), &mut config).unwrap();
        assert_eq!(config["dns.hosts"], "10.0.0.5 www a.example");
        assert_eq!(config["dns.srv"], "ldap tcp example.org ldap.example.org 389 10 5,sip udp");
        assert_eq!(config["dns.txt"], "spf v=spf1 a, b");
        assert_eq!(config["dns.forwarders"], "192.0.2.53,example.org=192.0.2.54,host.example=");
        assert_eq!(config["dns.plain"], "false");
        let spec = BridgeSpec::parse("n1", &config).unwrap();
        let shown = written(&spec).unwrap().document();
        assert_eq!(document(&shown).unwrap(), document(ALL).unwrap(), "{shown}");
        assert!(written(&BridgeSpec::default()).is_none());
    }

    #[test]
    fn a_record_is_one_record() {
        for wrong in [
            "<dns><txt name='a' value='b&#10;c d'/></dns>",
            "<dns><txt name='a' value=' b'/></dns>",
            "<dns><txt name='a b' value='c'/></dns>",
            "<dns><txt name='a'/></dns>",
            "<dns><host ip='10.0.0.5'><hostname>a,10.0.0.6 b</hostname></host></dns>",
            "<dns><host ip='10.0.0.5'/></dns>",
            "<dns><host><hostname>a</hostname></host></dns>",
            "<dns><host ip='x'><hostname>a</hostname></host></dns>",
            "<dns><srv service='a' protocol='tcp' port='1'/></dns>",
            "<dns><srv service='a' protocol='tcp' target='t' port='0'/></dns>",
            "<dns><srv service='a,b' protocol='tcp'/></dns>",
            "<dns><srv protocol='tcp'/></dns>",
            "<dns><forwarder/></dns>",
            "<dns><forwarder domain='a,b' addr='192.0.2.1'/></dns>",
            "<dns enable='no'><txt name='a' value='b'/></dns>",
            "<dns forwardPlainNames='perhaps'/>",
        ] {
            let e = read(&document(wrong).unwrap(), &mut Config::new()).expect_err(wrong);
            assert_eq!(e.code, Code::XmlError, "{wrong}: {e:?}");
        }
        let other = document("<dns><cname/></dns>").unwrap();
        assert_eq!(read(&other, &mut Config::new()).unwrap_err().code, Code::ConfigUnsupported);
    }
}
