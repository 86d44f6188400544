//! `virNetworkUpdate`: one part of a network's document is added, changed or removed, in its definition, in what it runs by, or
//! in both, each by itself.

use super::{
    Answered, Named,
    network::{find_uuid, guests},
    networks::{KEPT, failed, kept_entry, key_of, nic, reserve},
    nothing,
    power::ended,
};
use crate::{
    error::{Code, VirError},
    session::Call,
    xml::{
        Element,
        machine::refuse,
        network::{
            dns, hosts_of, ports,
            read::{self, Host},
        },
        read::document,
    },
};
use karst_engine::network::life::NetworkSides;
use karst_model::{
    Config,
    network::Network,
    network_names::{DnsHost, DnsService, DnsText, ReservedHost},
    network_ports::{NetworkPorts, group_of},
    uplink::NetworkKind,
};

/// `virNetworkUpdateCommand`
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Command {
    Modify,
    Delete,
    AddLast,
    AddFirst,
}

impl Command {
    fn of(number: u32) -> Result<Self, VirError> {
        Ok(match number {
            1 => Self::Modify,
            2 => Self::Delete,
            3 => Self::AddLast,
            4 => Self::AddFirst,
            other => {
                let text = format!("unrecognized network update command code {other}");
                return Err(VirError::argument(text));
            }
        })
    }

    /// Puts something into a list, where it is to stand.
    fn put<T>(self, all: &mut Vec<T>, new: T) {
        match self {
            Self::AddFirst => all.insert(0, new),
            _ => all.push(new),
        }
    }
}

/// `virNetworkUpdateFlags`
const LIVE: u32 = 1;
const CONFIG: u32 = 2;

/// `virNetworkUpdateSection`, by number.
const SECTIONS: [&str; 13] = [
    "none",
    "bridge",
    "domain",
    "ip",
    "ip-dhcp-host",
    "ip-dhcp-range",
    "forward",
    "forward-interface",
    "forward-pf",
    "portgroup",
    "dns-host",
    "dns-txt",
    "dns-srv",
];

/// What a section is changed in.
struct Part<'a> {
    network: &'a Network,
    command: Command,
    element: &'a Element,
}

fn invalid(text: impl Into<String>) -> VirError {
    failed(Code::OperationInvalid, text)
}

/// `NETWORK_UPDATE`
pub async fn update(call: Call) -> Answered {
    let (named, command, section, _, xml, flags) =
        call.arguments(|r| Ok((Named::read(r)?, r.u32()?, r.u32()?, r.i32()?, r.string()?, r.u32()?)))?;
    call.known_flags(flags, LIVE | CONFIG)?;
    let network = find_uuid(&call, named.uuid)?;
    let flags = match (flags, network.is_active()) {
        (0, true) => LIVE,
        (0, false) => CONFIG,
        (said, _) => said,
    };
    if flags & LIVE != 0 && !network.is_active() {
        return Err(invalid("network is not running"));
    }
    if flags & CONFIG != 0 && network.life.transient {
        return Err(invalid("cannot change persistent config of a transient network"));
    }
    let command = Command::of(command)?;
    let element = document(&xml)?;
    let part = Part { network: &network, command, element: &element };
    let name = SECTIONS.get(section as usize).copied().unwrap_or_default();
    if name == "ip-dhcp-host" && update_own_host(&call, &part).await? {
        return Ok(nothing());
    }
    let change: fn(&Part<'_>, &Config) -> Result<Config, VirError> = match name {
        "ip-dhcp-host" => dhcp_host,
        "ip-dhcp-range" => range,
        "dns-host" => dns_host,
        "dns-srv" => dns_service,
        "dns-txt" => dns_text,
        "bridge" | "domain" | "ip" | "forward" | "forward-pf" => {
            let name = name.replace('-', " ");
            let text = format!("can't update '{name}' section of network '{}'", &*network.name);
            return Err(failed(Code::OperationUnsupported, text));
        }
        "forward-interface" => forward_interface,
        "portgroup" => port_group,
        _ => {
            let text = "can't update unrecognized section of network";
            return Err(failed(Code::OperationUnsupported, text));
        }
    };
    // Both are known to be possible before either is done.
    let on = |side: u32, config: &Config| (flags & side != 0).then(|| change(&part, config)).transpose();
    let sides = NetworkSides {
        running: on(LIVE, network.running_config())?,
        defined: on(CONFIG, &network.config)?,
        if_version: Some(network.spec_version),
    };
    let session = &call.session;
    let (engine, context) = (&session.front.engine, &session.context);
    let project = &call.opened()?.project;
    ended(engine.network_change_sides(context, project, &network.name, sides).await?).await?;
    Ok(nothing())
}

/// A reserved address that an interface has by itself, or is to have, which is of both sides at once. Answers whether it was one.
async fn update_own_host(call: &Call, part: &Part<'_>) -> Result<bool, VirError> {
    let said = read::host_like(part.element)?;
    let name = &*part.network.name;
    let now = hosts_of(&guests(call)?, name);
    if part.command == Command::Delete {
        let Some(there) = now.iter().find(|h| said.is(h)) else { return Ok(false) };
        reserve(call, nic(call, name, &there.mac)?, key_of(there), None).await?;
        return Ok(true);
    }
    let host = read::host(part.element)?;
    let there = now.iter().find(|h| said.touches(h));
    match part.command {
        Command::Modify if there.is_none() => return Ok(false),
        Command::Modify => {}
        _ if there.is_some() => return Err(there_already(part, &host)),
        _ if host.address.is_ipv4() && nic(call, name, &host.mac).is_err() => return Ok(false),
        _ => {}
    }
    let (at, address) = (nic(call, name, &host.mac)?, host.address.to_string());
    reserve(call, at, key_of(&host), Some(address)).await?;
    Ok(true)
}

fn there_already(part: &Part<'_>, host: &Host) -> VirError {
    let (network, name) = (&*part.network.name, host.name.as_deref().unwrap_or("(null)"));
    invalid(format!(
        "there is an existing dhcp host entry in network '{network}' that matches \"<host mac='{}' name='{name}' ip='{}'/>\"",
        host.mac, host.address
    ))
}

/// An address that is kept for a MAC address.
fn dhcp_host(part: &Part<'_>, config: &Config) -> Result<Config, VirError> {
    let said = read::host_like(part.element)?;
    let network = &*part.network.name;
    let like = |kept: &ReservedHost| Host {
        mac: kept.mac.clone(),
        name: kept.name.clone(),
        address: kept.address.into(),
    };
    let mut all: Vec<Host> = dns::names(config)?.reserved.iter().map(like).collect();
    match part.command {
        Command::Delete => {
            let missing =
                || invalid(format!("couldn't locate a matching dhcp host entry in network '{network}'"));
            let at = all.iter().position(|h| said.is(h)).ok_or_else(missing)?;
            all.remove(at);
        }
        Command::Modify => {
            let host = read::host(part.element)?;
            let missing = || {
                invalid(format!(
                    "couldn't locate an existing dhcp host entry with \"mac='{}'\" \"name='{}'\" \"ip='{}'\" in network \
                     '{network}'",
                    host.mac,
                    host.name.as_deref().unwrap_or("(null)"),
                    host.address
                ))
            };
            let at = all.iter().position(|h| said.touches(h)).ok_or_else(missing)?;
            all[at] = host;
        }
        command => {
            let host = read::host(part.element)?;
            if all.iter().any(|h| said.touches(h)) {
                return Err(there_already(part, &host));
            }
            command.put(&mut all, host);
        }
    }
    let entries: Vec<String> = all.iter().map(kept_entry).collect::<Result<_, _>>()?;
    Ok(with_entries(config, KEPT, &entries, ","))
}

/// A record of DNS is added or removed whole.
fn not_modified(part: &Part<'_>, what: &str) -> Result<(), VirError> {
    if part.command != Command::Modify {
        return Ok(());
    }
    let text = format!("DNS {what} records cannot be modified, only added or deleted");
    Err(failed(Code::OperationUnsupported, text))
}

/// Takes the one entry that is meant out of a list.
fn take_one(all: &mut Vec<String>, found: &[usize], none: String, many: String) -> Result<(), VirError> {
    match found {
        [] => Err(invalid(none)),
        [at] => {
            all.remove(*at);
            Ok(())
        }
        _ => Err(invalid(many)),
    }
}

fn of_element(part: &Part<'_>, wanted: &str) -> Result<(), VirError> {
    match part.element.name() {
        found if found == wanted => Ok(()),
        found => Err(VirError::new(
            Code::XmlError,
            crate::error::Part::Network,
            format!(
                "unexpected element <{found}>, expecting <{wanted}>, while searching for \
                     section to update in network '{}'",
                &*part.network.name
            ),
        )),
    }
}

/// Where `is` holds.
fn places<T>(all: &[T], is: impl Fn(&T) -> bool) -> Vec<usize> {
    all.iter().enumerate().filter(|(_, one)| is(one)).map(|(at, _)| at).collect()
}

fn dns_host(part: &Part<'_>, config: &Config) -> Result<Config, VirError> {
    not_modified(part, "HOST")?;
    of_element(part, "host")?;
    let network = &*part.network.name;
    let (address, names) = dns::host(part.element, part.command == Command::Delete)?;
    let now = dns::names(config)?.hosts;
    let mut all: Vec<String> = now.iter().map(DnsHost::entry).collect();
    // Several addresses of one name are several records; two records of one address are not.
    let adds = part.command != Command::Delete;
    let found =
        places(&now, |h| Some(h.address) == address || !adds && h.names.iter().any(|n| names.contains(n)));
    if !adds {
        let none = format!("couldn't locate a matching DNS HOST record in network {network}");
        let many = format!("multiple matching DNS HOST records were found in network {network}");
        take_one(&mut all, &found, none, many)?;
    } else if found.is_empty() {
        part.command.put(&mut all, dns::host_entry(part.element)?);
    } else {
        let text = format!(
            "there is already at least one DNS HOST record with a matching field in network {network}"
        );
        return Err(invalid(text));
    }
    Ok(with_entries(config, "dns.hosts", &all, ","))
}

fn dns_service(part: &Part<'_>, config: &Config) -> Result<Config, VirError> {
    not_modified(part, "SRV")?;
    of_element(part, "srv")?;
    let network = &*part.network.name;
    let adds = part.command != Command::Delete;
    let (service, protocol, like) = dns::service(part.element, !adds)?;
    let now = dns::names(config)?.services;
    let mut all: Vec<String> = now.iter().map(DnsService::entry).collect();
    let found = places(&now, |s| {
        service.as_ref().is_none_or(|w| *w == s.service)
            && protocol.as_ref().is_none_or(|w| *w == s.protocol)
            && (like.domain.is_none() || like.domain == s.domain)
            && (like.target.is_none() || like.target == s.target)
    });
    if !adds {
        let none = format!("couldn't locate a matching DNS SRV record in network {network}");
        let many =
            format!("multiple DNS SRV records matching all specified fields were found in network {network}");
        take_one(&mut all, &found, none, many)?;
    } else if found.is_empty() {
        part.command.put(&mut all, dns::service_entry(part.element)?);
    } else {
        let text = format!(
            "there is already at least one DNS SRV record matching all specified fields in network {network}"
        );
        return Err(invalid(text));
    }
    Ok(with_entries(config, "dns.srv", &all, ","))
}

fn dns_text(part: &Part<'_>, config: &Config) -> Result<Config, VirError> {
    not_modified(part, "TXT")?;
    of_element(part, "txt")?;
    let network = &*part.network.name;
    let name = part.element.attribute("name").unwrap_or_default();
    let now = dns::names(config)?.texts;
    let mut all: Vec<String> = now.iter().map(DnsText::entry).collect();
    let there = now.iter().position(|t| t.name == name);
    match (part.command, there) {
        (Command::Delete, Some(at)) => drop(all.remove(at)),
        (Command::Delete, None) => {
            return Err(invalid(format!("couldn't locate a matching DNS TXT record in network {network}")));
        }
        (_, Some(_)) => {
            let text = format!("there is already a DNS TXT record with name '{name}' in network {network}");
            return Err(invalid(text));
        }
        (command, None) => command.put(&mut all, dns::text_entry(part.element)?),
    }
    Ok(with_entries(config, "dns.txt", &all, "\n"))
}

/// Entries of a key that is a list with commas.
fn entries(config: &Config, key: &str) -> Vec<String> {
    let all = config.get(key).map(String::as_str).unwrap_or_default().split(',');
    all.map(str::trim).filter(|e| !e.is_empty()).map(str::to_owned).collect()
}

/// The configuration with another such list.
fn with_entries(config: &Config, key: &str, all: &[String], between: &str) -> Config {
    let mut config = config.clone();
    match all.is_empty() {
        true => drop(config.remove(key)),
        false => drop(config.insert(key.to_owned(), all.join(between))),
    }
    config
}

/// A network that leads to an interface of the host has that one.
fn forward_interface(part: &Part<'_>, config: &Config) -> Result<Config, VirError> {
    of_element(part, "interface")?;
    if part.command == Command::Modify {
        let text = "forward interface entries cannot be modified, only added or deleted";
        return Err(failed(Code::OperationUnsupported, text));
    }
    let network = &*part.network.name;
    let missing = || failed(Code::XmlError, "missing dev attribute in <interface> element");
    let device = part.element.attribute("dev").ok_or_else(missing)?;
    let of_interface = part.network.kind == NetworkKind::Macvlan;
    let there = of_interface && config.get("parent").is_some_and(|parent| parent == device);
    match (part.command, there) {
        (Command::Delete, false) => Err(invalid(format!(
            "couldn't find an interface entry in network '{network}' matching <interface dev='{device}'>"
        ))),
        (Command::Delete, true) => {
            Err(refuse("interface", "it is what the network leads to; define the network with another"))
        }
        (_, true) => Err(invalid(format!(
            "there is an existing interface entry in network '{network}' that matches \"<interface dev='{device}'>\""
        ))),
        (_, false) if of_interface => {
            Err(refuse("interface", "guests share one interface of the host; a bond is one too"))
        }
        (_, false) => Err(refuse(
            "interface",
            "what leaves goes where the host's routes lead, not through one interface",
        )),
    }
}

/// A group of ports, whole.
fn port_group(part: &Part<'_>, config: &Config) -> Result<Config, VirError> {
    of_element(part, "portgroup")?;
    let network = &*part.network.name;
    let (name, keys) = ports::group(part.element)?;
    let now = NetworkPorts::parse(config)?;
    let there = now.group(Some(&name)).is_some();
    match part.command {
        Command::Modify | Command::Delete if !there => {
            return Err(invalid(format!(
                "couldn't find a portgroup entry in network '{network}' matching <portgroup name='{name}'>"
            )));
        }
        Command::AddFirst | Command::AddLast if there => {
            return Err(invalid(format!(
                "there is an existing portgroup entry in network '{network}' that matches \"<portgroup name='{name}'>\""
            )));
        }
        _ => {}
    }
    let usual = part.element.attribute("default") == Some("yes");
    if part.command != Command::Delete && usual && now.group(None).is_some_and(|g| g.name != name) {
        return Err(invalid(format!(
            "a different portgroup entry in network '{network}' is already set as the default. Only one default is allowed."
        )));
    }
    let mut config = config.clone();
    config.retain(|key, _| group_of(key) != Some(name.as_str()));
    if part.command != Command::Delete {
        config.extend(keys);
    }
    Ok(config)
}

fn range(part: &Part<'_>, config: &Config) -> Result<Config, VirError> {
    let name = &*part.network.name;
    let range = read::range(part.element)?;
    let key = format!("{}.dhcp.ranges", if range.contains(':') { "ipv6" } else { "ipv4" });
    let mut all = entries(config, &key);
    let there = all.iter().position(|r| *r == range);
    match (part.command, there) {
        (Command::Modify, _) => {
            let text = "dhcp ranges cannot be modified, only added or deleted";
            return Err(failed(Code::OperationUnsupported, text));
        }
        (Command::Delete, Some(at)) => drop(all.remove(at)),
        (Command::Delete, None) => {
            return Err(invalid(format!("couldn't locate a matching dhcp range entry in network '{name}'")));
        }
        (command, None) => command.put(&mut all, range),
        (_, Some(_)) => {
            let (start, end) = range.split_once('-').unwrap_or_default();
            return Err(invalid(format!(
                "there is an existing dhcp range entry in network '{name}' that matches \"<range start='{start}' end='{end}'/>\""
            )));
        }
    }
    Ok(with_entries(config, &key, &all, ","))
}
