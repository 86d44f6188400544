//! `<bandwidth>` and `<portgroup>` of networks as keys, and back. libvirt's rates are KiB a second, its bursts KiB.

use crate::{
    error::VirError,
    xml::{
        Element,
        machine::{refuse, wrong},
    },
};
use karst_model::{
    Config,
    network_ports::{GROUP, NetworkPorts, PortGroup, Rate, Rates, is_group},
};

/// What a direction of `<bandwidth>` says: average and peak in kbit a second, burst in KiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Direction {
    /// Average.
    pub average: Option<u64>,
    /// Peak.
    pub peak: Option<u64>,
    /// Burst.
    pub burst: Option<u64>,
}

/// `<inbound>` or `<outbound>` of an element with `<bandwidth>`.
///
/// # Errors
/// XML error; unsupported for a floor.
pub fn direction(of: &Element, name: &str) -> Result<Direction, VirError> {
    let Some(e) = of.find("bandwidth").and_then(|b| b.find(name)) else { return Ok(Direction::default()) };
    if e.attribute("floor").is_some() {
        return Err(refuse("bandwidth floor", "nothing of a network's rate is set aside for one interface"));
    }
    let number = |name: &str| -> Result<Option<u64>, VirError> {
        let found = e.attribute(name).map(str::parse::<u64>).transpose();
        found
            .map_err(|_| wrong(format!("bandwidth '{}' is no number", e.attribute(name).unwrap_or_default())))
    };
    let kbit = |n: u64| n.saturating_mul(8192).div_ceil(1000);
    let said = Direction {
        average: number("average")?.map(kbit),
        peak: number("peak")?.map(kbit),
        burst: number("burst")?,
    };
    match said.average.is_none() && said != Direction::default() {
        true => Err(wrong(format!("Missing mandatory average of <{name}>"))),
        false => Ok(said),
    }
}

/// Of an element all that its `<bandwidth>` says, as keys that begin with `prefix`.
fn put(of: &Element, prefix: &str, config: &mut Config) -> Result<(), VirError> {
    if let Some(all) = of.find("bandwidth")
        && let Some(other) = all.elements().iter().find(|e| !matches!(e.name(), "inbound" | "outbound"))
    {
        return Err(refuse(other.name(), "a <bandwidth> is inbound and outbound"));
    }
    for (name, key) in [("inbound", "ingress"), ("outbound", "egress")] {
        let said = direction(of, name)?;
        let base = format!("{prefix}limits.{key}");
        let mut set = |key: String, value: Option<String>| {
            if let Some(value) = value {
                config.insert(key, value);
            }
        };
        set(base.clone(), said.average.map(|n| format!("{n}kbit")));
        set(format!("{base}.peak"), said.peak.map(|n| format!("{n}kbit")));
        set(format!("{base}.burst"), said.burst.map(|n| format!("{n}KiB")));
    }
    Ok(())
}

/// `<bandwidth>` of a network.
///
/// # Errors
/// Those of [`direction`].
pub fn read_rates(network: &Element, config: &mut Config) -> Result<(), VirError> {
    put(network, "", config)
}

/// `<portgroup>`: its name, and its keys.
///
/// # Errors
/// XML error; unsupported for what no port has.
pub fn group(e: &Element) -> Result<(String, Config), VirError> {
    if e.name() != "portgroup" {
        return Err(wrong(format!("unexpected element <{}>, expecting <portgroup>", e.name())));
    }
    let name = e.attribute("name").ok_or_else(|| wrong("missing name of <portgroup>"))?;
    if !is_group(name) {
        return Err(refuse(
            "portgroup name",
            format!("'{name}' is not of letters, digits, '-', '_' and '.'"),
        ));
    }
    if let Some(other) = e.elements().iter().find(|c| c.name() != "bandwidth") {
        return Err(refuse(&format!("portgroup {}", other.name()), "a group of ports has rates"));
    }
    if e.attribute("trustGuestRxFilters") == Some("yes") {
        return Err(refuse("portgroup trustGuestRxFilters", "a guest's addresses are its own"));
    }
    let usual = e.attribute("default") == Some("yes");
    let mut config = Config::from([(format!("{GROUP}{name}.default"), usual.to_string())]);
    put(e, &format!("{GROUP}{name}."), &mut config)?;
    Ok((name.to_owned(), config))
}

fn bandwidth(rates: &Rates) -> Option<Element> {
    let one = |name: &'static str, rate: &Rate| {
        let e = Element::new(name).with("average", rate.average / 8192);
        let e = e.with_some("peak", rate.more.peak.map(|b| b / 8192));
        e.with_some("burst", rate.more.burst.map(|b| b / 1024))
    };
    let mut all = Element::new("bandwidth");
    all.push_some(rates.ingress.as_ref().map(|r| one("inbound", r)));
    all.push_some(rates.egress.as_ref().map(|r| one("outbound", r)));
    (!all.elements().is_empty()).then_some(all)
}

/// `<bandwidth>` of a network.
pub fn rates(ports: &NetworkPorts) -> Option<Element> {
    bandwidth(&ports.rates)
}

/// All `<portgroup>` of a network.
pub fn groups(ports: &NetworkPorts) -> impl Iterator<Item = Element> {
    ports.groups.iter().map(|PortGroup { name, usual, rates }| {
        let e = Element::new("portgroup").with("name", name).with_some("default", usual.then_some("yes"));
        e.children(bandwidth(rates))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{error::Code, xml::read::document};

    #[test]
    fn rates_come_back_as_they_were() {
        let text = "<network><bandwidth><inbound average='1000' peak='5000' burst='5120'/><outbound average='128'/></bandwidth></network>";
        let group_text = "<portgroup name='slow' default='yes'><bandwidth><outbound average='64'/></bandwidth></portgroup>";
        let mut config = Config::new();
        read_rates(&document(text).unwrap(), &mut config).unwrap();
        assert_eq!(
            (config["limits.ingress"].as_str(), config["limits.ingress.burst"].as_str()),
            ("8192kbit", "5120KiB")
        );
        let (name, keys) = group(&document(group_text).unwrap()).unwrap();
        assert_eq!((name.as_str(), keys["portgroup.slow.default"].as_str()), ("slow", "true"));
        config.extend(keys);
        let ports = NetworkPorts::parse(&config).unwrap();
        let shown = Element::new("network").children(rates(&ports));
        assert_eq!(shown, document(text).unwrap());
        assert_eq!(groups(&ports).next().unwrap(), document(group_text).unwrap());
    }

    #[test]
    fn what_no_port_has_is_named() {
        for (text, code, says) in [
            ("<portgroup/>", Code::XmlError, "name"),
            ("<portgroup name='a b'/>", Code::ConfigUnsupported, "portgroup name"),
            (
                "<portgroup name='a'><vlan><tag id='5'/></vlan></portgroup>",
                Code::ConfigUnsupported,
                "portgroup vlan",
            ),
            (
                "<portgroup name='a'><bandwidth><inbound average='1' floor='1'/></bandwidth></portgroup>",
                Code::ConfigUnsupported,
                "floor",
            ),
            (
                "<portgroup name='a'><bandwidth><inbound peak='1'/></bandwidth></portgroup>",
                Code::XmlError,
                "average",
            ),
            (
                "<portgroup name='a'><bandwidth><inbound average='x'/></bandwidth></portgroup>",
                Code::XmlError,
                "number",
            ),
        ] {
            let e = group(&document(text).unwrap()).unwrap_err();
            assert!(e.code == code && e.text.contains(says), "{text}: {e:?}");
        }
    }
}
