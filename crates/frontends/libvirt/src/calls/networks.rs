//! Making, changing and removing networks; reserved addresses; ports. A network of Karst is active from the moment it is
//! defined, on every start of the host, as pools are.

use super::{
    Answered, Named, listed,
    network::{all, find, find_uuid, one},
    nothing,
    power::ended,
    text,
};
use crate::{
    domain_uuid,
    error::{Code, Part, VirError},
    network_uuid,
    session::Call,
    xdr::{Reader, Writer},
    xml::{
        Element,
        machine::refuse,
        network::{
            UUID, hosts_of,
            read::{self, Host, NewNetwork},
        },
        read::document,
    },
};
use karst_engine::{
    InstanceView, Row,
    compute::update::UpdateInstance,
    network::{CreateNetwork, UpdateNetwork},
};
use karst_model::{Config, network::Network, uplink::NetworkKind};
use std::sync::Arc;
use uuid::Uuid;

/// Keys that a document says everything of; others are kept when it changes.
const SAID: &[&str] = &[
    "bridge.hwaddr",
    "bridge.mtu",
    "dns.domain",
    "dns.mode",
    "ipv4.address",
    "ipv4.dhcp",
    "ipv4.dhcp.ranges",
    "ipv4.firewall",
    "ipv4.nat",
    "ipv4.nat.address",
    "ipv4.routing",
    "ipv6.address",
    "ipv6.dhcp.ranges",
    "ipv6.dhcp.stateful",
    "ipv6.firewall",
    "ipv6.nat",
    "ipv6.nat.address",
    "ipv6.routing",
    "mtu",
    "parent",
];

fn failed(code: Code, text: impl Into<String>) -> VirError {
    VirError::new(code, Part::Network, text)
}

/// The NIC of a MAC address on a network: its guest and the device's name.
fn nic(call: &Call, network: &str, mac: &str) -> Result<(Arc<InstanceView>, String), VirError> {
    let session = &call.session;
    let views = session.front.engine.instances(&session.context, &call.opened()?.project)?;
    for view in views {
        let named = view.instance.identities.iter().find(|(name, identity)| {
            let on = view.expanded_devices.get(*name).and_then(|keys| keys.get("network"));
            identity.mac.as_deref() == Some(mac) && on.is_some_and(|n| n == network)
        });
        if let Some((device, _)) = named {
            return Ok((view.clone(), device.clone()));
        }
    }
    let why = format!(
        "addresses are reserved for interfaces that are there; none with {mac} is on network '{network}': define its domain first"
    );
    Err(refuse("host", why))
}

/// Gives an interface its address, or takes it back.
async fn reserve(
    call: &Call,
    (view, device): (Arc<InstanceView>, String),
    key: &str,
    address: Option<String>,
) -> Result<(), VirError> {
    let mut devices = view.instance.devices.clone();
    let mut keys = view.expanded_devices.get(&device).cloned().unwrap_or_default();
    match address {
        Some(address) if keys.get(key) == Some(&address) => return Ok(()),
        Some(address) => drop(keys.insert(key.to_owned(), address)),
        None => drop(keys.remove(key)),
    }
    devices.insert(device, keys);
    let request = UpdateInstance {
        description: view.instance.description.clone(),
        ephemeral: view.instance.ephemeral,
        config: view.instance.config.clone(),
        devices,
        profiles: view.profiles.iter().map(|p| p.name.to_string()).collect(),
        if_version: Some(view.instance.spec_version),
    };
    let session = &call.session;
    let (engine, context) = (&session.front.engine, &session.context);
    ended(engine.instance_update(context, &view.project.name, &view.instance.name, request).await?).await
}

fn key_of(host: &Host) -> &'static str {
    if host.address.is_ipv4() { "ipv4.address" } else { "ipv6.address" }
}

/// The reserved addresses of a network as a document says them.
async fn reserve_all(call: &Call, network: &str, wanted: &[Host]) -> Result<(), VirError> {
    let all: Vec<_> =
        wanted.iter().map(|h| Ok((nic(call, network, &h.mac)?, h))).collect::<Result<_, VirError>>()?;
    let now = hosts_of(&super::network::guests(call)?, network);
    for old in now.iter().filter(|o| !wanted.iter().any(|w| (&w.mac, key_of(w)) == (&o.mac, key_of(o)))) {
        reserve(call, nic(call, network, &old.mac)?, key_of(old), None).await?;
    }
    for (at, host) in all {
        // One that was changed above has another version now.
        let at = nic(call, network, &host.mac).unwrap_or(at);
        reserve(call, at, key_of(host), Some(host.address.to_string())).await?;
    }
    Ok(())
}

async fn update_config(
    call: &Call,
    network: &Network,
    description: String,
    config: Config,
) -> Result<(), VirError> {
    let session = &call.session;
    let (engine, context) = (&session.front.engine, &session.context);
    let request = UpdateNetwork { description, config, if_version: Some(network.spec_version) };
    let project = &call.opened()?.project;
    ended(engine.network_update(context, project, &network.name, request).await?).await
}

async fn define_text(call: &Call, text: &str) -> Answered {
    let known = all(call)?;
    let bridge_of = |name: &str| known.iter().find(|n| *n.name == *name).map(|n| n.interface().to_owned());
    let new: NewNetwork = read::network_again(text, &bridge_of)?;
    if let Some(there) = known.into_iter().find(|n| *n.name == *new.name) {
        let uuid = network_uuid(&there);
        if new.uuid != Some(uuid) {
            let text = format!("network '{}' already exists with uuid {uuid}", new.name);
            return Err(failed(Code::OperationFailed, text));
        }
        if there.kind != new.kind {
            return Err(refuse("forward", "what a network is made of is fixed since it was made"));
        }
        let mut config = there.config.clone();
        config.retain(|key, _| !SAID.contains(&key.as_str()));
        config.extend(new.config);
        if there.id.uuid() == uuid {
            config.remove(UUID);
        }
        update_config(call, &there, new.description, config).await?;
        reserve_all(call, &new.name, &new.hosts).await?;
        return one(&*find(call, &new.name)?);
    }
    if let Some(other) = new.uuid.and_then(|u| find_uuid(call, u).ok()) {
        let text = format!("network '{}' already exists with uuid {}", &*other.name, network_uuid(&other));
        return Err(failed(Code::OperationFailed, text));
    }
    if let Some(host) = new.hosts.first() {
        nic(call, &new.name, &host.mac)?;
    }
    let session = &call.session;
    let (engine, context) = (&session.front.engine, &session.context);
    let request = CreateNetwork {
        name: new.name.clone(),
        description: new.description,
        kind: new.kind,
        config: new.config,
        any_name: false,
    };
    let (_, operation) = engine.network_create(context, &call.opened()?.project, request).await?;
    ended(operation).await?;
    one(&*find(call, &new.name)?)
}

/// `NETWORK_DEFINE_XML`
pub async fn define(call: Call) -> Answered {
    let text = call.arguments(|r| r.string())?;
    define_text(&call, &text).await
}

/// `NETWORK_DEFINE_XML_FLAGS`
pub async fn define_flags(call: Call) -> Answered {
    let (text, flags) = call.arguments(|r| Ok((r.string()?, r.u32()?)))?;
    // Checked against the schema.
    call.known_flags(flags, 1)?;
    define_text(&call, &text).await
}

fn no_transients() -> VirError {
    failed(Code::OperationUnsupported, "networks are persistent here; define one")
}

/// `NETWORK_CREATE_XML`: there are no transient ones.
pub async fn create_xml(call: Call) -> Answered {
    call.arguments(|r| r.string())?;
    Err(no_transients())
}

/// `NETWORK_CREATE_XML_FLAGS`
pub async fn create_xml_flags(call: Call) -> Answered {
    call.arguments(|r| Ok((r.string()?, r.u32()?)))?;
    Err(no_transients())
}

fn only(call: &Call) -> Result<Row<Network>, VirError> {
    find_uuid(call, call.arguments(Named::read)?.uuid)
}

/// `NETWORK_CREATE`: it is active already, which is what is asked for.
pub async fn create(call: Call) -> Answered {
    only(&call)?;
    Ok(nothing())
}

/// `NETWORK_DESTROY`
pub async fn destroy(call: Call) -> Answered {
    only(&call)?;
    Err(failed(
        Code::OperationUnsupported,
        "networks are always active here; net-undefine removes one that is not used",
    ))
}

/// `NETWORK_UNDEFINE`
pub async fn undefine(call: Call) -> Answered {
    let network = only(&call)?;
    let session = &call.session;
    let (engine, context) = (&session.front.engine, &session.context);
    ended(engine.network_delete(context, &call.opened()?.project, &network.name).await?).await?;
    Ok(nothing())
}

/// `NETWORK_SET_AUTOSTART`
pub async fn set_autostart(call: Call) -> Answered {
    let (named, wanted) = call.arguments(|r| Ok((Named::read(r)?, r.i32()?)))?;
    find_uuid(&call, named.uuid)?;
    match wanted {
        0 => Err(failed(Code::OperationUnsupported, "networks begin with their host")),
        _ => Ok(nothing()),
    }
}

/// `virNetworkUpdateCommand`
const MODIFY: u32 = 1;
const DELETE: u32 = 2;
const ADD_LAST: u32 = 3;
const ADD_FIRST: u32 = 4;
/// `virNetworkUpdateSection`
const DHCP_HOST: u32 = 4;
const DHCP_RANGE: u32 = 5;
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

/// `NETWORK_UPDATE`: reserved addresses and ranges, live and for good.
pub async fn update(call: Call) -> Answered {
    let (named, command, section, _, xml, flags) =
        call.arguments(|r| Ok((Named::read(r)?, r.u32()?, r.u32()?, r.i32()?, r.string()?, r.u32()?)))?;
    call.known_flags(flags, 1 | 2)?;
    let network = find_uuid(&call, named.uuid)?;
    if !matches!(command, MODIFY | DELETE | ADD_LAST | ADD_FIRST) {
        return Err(VirError::argument(format!("unrecognized network update command code {command}")));
    }
    let e = document(&xml)?;
    match section {
        DHCP_HOST => update_host(&call, &network, command, &e).await?,
        DHCP_RANGE => update_range(&call, &network, command, &e).await?,
        other => {
            let name = SECTIONS.get(other as usize).copied().unwrap_or("unknown");
            let text = format!("'{name}' of a network changes by its definition (net-define, net-edit)");
            return Err(failed(Code::OperationUnsupported, text));
        }
    }
    Ok(nothing())
}

async fn update_host(call: &Call, network: &Network, command: u32, e: &Element) -> Result<(), VirError> {
    let host = read::host(e)?;
    let now = hosts_of(&super::network::guests(call)?, &network.name);
    let there = now.iter().find(|h| h.mac == host.mac && key_of(h) == key_of(&host));
    let wrong = |text: String| Err(failed(Code::OperationInvalid, text));
    match (command, there) {
        (MODIFY, None) => {
            return wrong(format!(
                "couldn't locate an existing dhcp host entry with \"mac='{}'\" in network '{}'",
                host.mac, &*network.name
            ));
        }
        (DELETE, None) => {
            let name = &*network.name;
            return wrong(format!("couldn't locate a matching dhcp host entry in network '{name}'"));
        }
        (ADD_LAST | ADD_FIRST, Some(there)) => {
            return wrong(format!(
                "there is an existing dhcp host entry in network '{}' that matches \"<host mac='{}' ip='{}'/>\"",
                &*network.name, there.mac, there.address
            ));
        }
        _ => {}
    }
    let address = (command != DELETE).then(|| host.address.to_string());
    reserve(call, nic(call, &network.name, &host.mac)?, key_of(&host), address).await
}

async fn update_range(call: &Call, network: &Network, command: u32, e: &Element) -> Result<(), VirError> {
    let range = read::range(e)?;
    let family = if range.contains(':') { "ipv6" } else { "ipv4" };
    let key = format!("{family}.dhcp.ranges");
    let now = network.config.get(&key).map(String::as_str).unwrap_or_default();
    let mut all: Vec<&str> = now.split(',').map(str::trim).filter(|r| !r.is_empty()).collect();
    let there = all.iter().position(|r| *r == range);
    match (command, there) {
        (DELETE, Some(at)) => {
            all.remove(at);
        }
        (ADD_LAST, None) => all.push(&range),
        (ADD_FIRST, None) => all.insert(0, &range),
        (DELETE, None) => {
            let text = format!("couldn't locate a matching dhcp range entry in network '{}'", &*network.name);
            return Err(failed(Code::OperationInvalid, text));
        }
        (ADD_LAST | ADD_FIRST, Some(_)) => {
            let (start, end) = range.split_once('-').unwrap_or_default();
            let text = format!(
                "there is an existing dhcp range entry in network '{}' that matches \"<range start='{start}' end='{end}'/>\"",
                &*network.name
            );
            return Err(failed(Code::OperationInvalid, text));
        }
        _ => {
            let text = "dhcp ranges cannot be modified, only added or deleted";
            return Err(failed(Code::OperationUnsupported, text));
        }
    }
    let mut config = network.config.clone();
    match all.is_empty() {
        true => drop(config.remove(&key)),
        false => drop(config.insert(key, all.join(","))),
    }
    update_config(call, network, network.description.clone(), config).await
}

/// A port: an interface of a guest that runs.
struct Port {
    uuid: Uuid,
    mac: String,
    guest: Arc<InstanceView>,
}

fn ports(call: &Call, network: &Network) -> Result<Vec<Port>, VirError> {
    let mut all = vec![];
    for guest in super::network::guests(call)?.into_iter().filter(|v| super::domain::is_running(v)) {
        let devices = guest.run().map_or(&guest.expanded_devices, |run| &run.devices);
        for (name, identity) in &guest.run_identities() {
            let on = devices.get(name).and_then(|keys| keys.get("network"));
            if let (Some(mac), true) = (&identity.mac, on.is_some_and(|n| **n == *network.name)) {
                all.push(Port { uuid: identity.id.uuid(), mac: mac.clone(), guest: guest.clone() });
            }
        }
    }
    all.sort_by_key(|p| p.uuid);
    Ok(all)
}

fn write_port(w: &mut Writer, network: &Network, uuid: Uuid) {
    w.string(&network.name).uuid(network_uuid(network)).uuid(uuid);
}

/// `NETWORK_LIST_ALL_PORTS`
pub async fn list_ports(call: Call) -> Answered {
    let (named, need_results, flags) = call.arguments(|r| Ok((Named::read(r)?, r.i32()?, r.u32()?)))?;
    call.known_flags(flags, 0)?;
    let network = find_uuid(&call, named.uuid)?;
    listed(ports(&call, &network)?, need_results, |w, port| write_port(w, &network, port.uuid))
}

fn port(call: &Call, named: &Named, uuid: Uuid) -> Result<(Row<Network>, Port), VirError> {
    let network = find_uuid(call, named.uuid)?;
    let found = ports(call, &network)?.into_iter().find(|p| p.uuid == uuid);
    let missing = || failed(Code::NoNetworkPort, format!("no network port with matching uuid '{uuid}'"));
    Ok((network, found.ok_or_else(missing)?))
}

fn port_named(r: &mut Reader<'_>) -> Result<(Named, Uuid), VirError> {
    Ok((Named::read(r)?, r.uuid()?))
}

/// `NETWORK_PORT_LOOKUP_BY_UUID`
pub async fn port_by_uuid(call: Call) -> Answered {
    let (named, uuid) = call.arguments(port_named)?;
    let (network, port) = port(&call, &named, uuid)?;
    let mut w = Writer::new();
    write_port(&mut w, &network, port.uuid);
    Ok(w.finish().into())
}

/// `NETWORK_PORT_GET_XML_DESC`
pub async fn port_xml(call: Call) -> Answered {
    let ((named, uuid), flags) = call.arguments(|r| Ok((port_named(r)?, r.u32()?)))?;
    call.known_flags(flags, 0)?;
    let (network, port) = port(&call, &named, uuid)?;
    let plug = match network.kind {
        NetworkKind::Bridge => {
            Element::new("plug").with("type", "network").with("bridge", network.interface())
        }
        _ => Element::new("plug")
            .with("type", "direct")
            .with_some("dev", network.config.get("parent"))
            .with("mode", "bridge"),
    };
    let owner = Element::new("owner")
        .child(Element::text("name", &port.guest.instance.name))
        .child(Element::text("uuid", domain_uuid(&port.guest)));
    let e = Element::new("networkport")
        .child(Element::text("uuid", port.uuid))
        .child(owner)
        .child(Element::new("mac").with("address", &port.mac))
        .child(plug);
    Ok(text(&e.document()))
}
