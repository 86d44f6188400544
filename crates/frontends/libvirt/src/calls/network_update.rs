//! `virNetworkUpdate`: one part of a network's document is added, changed or removed, in its definition, in what it runs by, or
//! in both, each by itself.

use super::{
    Answered, Named,
    network::{find_uuid, guests},
    networks::{failed, key_of, nic, reserve},
    nothing,
    power::ended,
};
use crate::{
    error::{Code, VirError},
    session::Call,
    xml::{
        Element,
        network::{hosts_of, read},
        read::document,
    },
};
use karst_engine::network::life::NetworkSides;
use karst_model::{Config, network::Network};

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
    if name == "ip-dhcp-host" {
        update_host(&call, &part).await?;
        return Ok(nothing());
    }
    let change: fn(&Part<'_>, &Config) -> Result<Config, VirError> = match name {
        "ip-dhcp-range" => range,
        "bridge" | "domain" | "ip" | "forward" | "forward-pf" => {
            let text = format!("can't update '{name}' section of network '{}'", &*network.name);
            return Err(failed(Code::OperationUnsupported, text));
        }
        "forward-interface" | "portgroup" | "dns-host" | "dns-txt" | "dns-srv" => {
            let text = format!("'{name}' of a network changes by its definition (net-define, net-edit)");
            return Err(failed(Code::OperationUnsupported, text));
        }
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

/// A reserved address, which is of both sides at once.
async fn update_host(call: &Call, part: &Part<'_>) -> Result<(), VirError> {
    let host = read::host(part.element)?;
    let name = &*part.network.name;
    let now = hosts_of(&guests(call)?, name);
    let there = now.iter().find(|h| h.mac == host.mac && key_of(h) == key_of(&host));
    match (part.command, there) {
        (Command::Modify, None) => {
            return Err(invalid(format!(
                "couldn't locate an existing dhcp host entry with \"mac='{}'\" in network '{name}'",
                host.mac
            )));
        }
        (Command::Delete, None) => {
            return Err(invalid(format!("couldn't locate a matching dhcp host entry in network '{name}'")));
        }
        (Command::AddLast | Command::AddFirst, Some(there)) => {
            return Err(invalid(format!(
                "there is an existing dhcp host entry in network '{name}' that matches \"<host mac='{}' ip='{}'/>\"",
                there.mac, there.address
            )));
        }
        _ => {}
    }
    let address = (part.command != Command::Delete).then(|| host.address.to_string());
    reserve(call, nic(call, name, &host.mac)?, key_of(&host), address).await
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
