//! Making, starting, stopping and removing networks; reserved addresses; ports. Single parts of one change in
//! [`super::network_update`].

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
            UUID, dns, hosts_of,
            read::{self, Host, NewNetwork},
        },
    },
};
use karst_engine::{
    InstanceView, Row,
    compute::update::UpdateInstance,
    network::{CreateNetwork, UpdateNetwork},
};
use karst_model::{
    Config, network::Network, network_life::NetworkBeginning, network_names::NetworkNames,
    uplink::NetworkKind,
};
use std::{net::IpAddr, sync::Arc};
use uuid::Uuid;

pub(super) fn failed(code: Code, text: impl Into<String>) -> VirError {
    VirError::new(code, Part::Network, text)
}

/// The NIC of a MAC address on a network: its guest and the device's name.
pub(super) fn nic(call: &Call, network: &str, mac: &str) -> Result<(Arc<InstanceView>, String), VirError> {
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
pub(super) async fn reserve(
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

pub(super) fn key_of(host: &Host) -> &'static str {
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

/// What a document says of a network that is there: keys that no document has a word for stay.
fn said_anew(there: &Network, new: &NewNetwork) -> Result<Config, VirError> {
    if there.kind != new.kind {
        return Err(refuse("forward", "what a network is made of is fixed since it was made"));
    }
    let mut config = there.config.clone();
    config.retain(|key, _| !read::is_said(key));
    config.extend(new.config.iter().map(|(key, value)| (key.clone(), value.clone())));
    if new.uuid == Some(there.id.uuid()) {
        config.remove(UUID);
    }
    Ok(config)
}

/// Splits reserved addresses: those that interfaces have by themselves stay theirs, the others become a key of the network, for
/// whoever comes with the MAC address. Answers the former.
fn keep_hosts(call: &Call, new: &mut NewNetwork) -> Result<Vec<Host>, VirError> {
    let now = hosts_of(&super::network::guests(call)?, &new.name);
    // An interface that is there has its address by itself, so that other clients see it there.
    let theirs = |h: &Host| {
        now.iter().any(|o| o.mac == h.mac && key_of(o) == key_of(h)) || nic(call, &new.name, &h.mac).is_ok()
    };
    let all = new.hosts.clone();
    let (own, kept): (Vec<Host>, Vec<Host>) = all.into_iter().partition(|h| h.address.is_ipv6() || theirs(h));
    let kept: Vec<String> = kept.iter().map(kept_entry).collect::<Result<_, _>>()?;
    if !kept.is_empty() {
        new.config.insert(KEPT.into(), kept.join(","));
    }
    Ok(own)
}

/// The key of addresses that are kept for MAC addresses.
pub(super) const KEPT: &str = "ipv4.dhcp.hosts";

/// An entry of that key.
pub(super) fn kept_entry(host: &Host) -> Result<String, VirError> {
    let IpAddr::V4(address) = host.address else {
        return Err(refuse("host", "IPv6 addresses are reserved for interfaces that are there"));
    };
    let name = host.name.as_ref().map(|n| format!(" {n}")).unwrap_or_default();
    let entry = format!("{} {address}{name}", host.mac);
    let config = Config::from([(KEPT.to_owned(), entry.clone())]);
    let same = |names: &NetworkNames| names.reserved.len() == 1 && names.reserved[0].entry() == entry;
    match dns::names(&config) {
        Ok(names) if same(&names) => Ok(entry),
        _ => Err(VirError::new(
            Code::XmlError,
            Part::Network,
            format!(
                "Cannot use MAC address '{}' or host name '{}'",
                host.mac,
                host.name.as_deref().unwrap_or_default()
            ),
        )),
    }
}

async fn create_new(call: &Call, mut new: NewNetwork, beginning: NetworkBeginning) -> Answered {
    if let Some(other) = new.uuid.and_then(|u| find_uuid(call, u).ok()) {
        let uuid = network_uuid(&other);
        let text = format!("network '{}' is already defined with uuid {uuid}", &*other.name);
        return Err(failed(Code::OperationFailed, text));
    }
    if let Some(host) = keep_hosts(call, &mut new)?.first() {
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
        beginning,
        interface: new.interface,
    };
    let (_, operation) = engine.network_create(context, &call.opened()?.project, request).await?;
    ended(operation).await?;
    one(&*find(call, &new.name)?)
}

async fn define_text(call: &Call, text: &str) -> Answered {
    let known = all(call)?;
    let bridge_of = |name: &str| known.iter().find(|n| *n.name == *name).map(|n| n.interface().to_owned());
    let mut new: NewNetwork = read::network_again(text, &bridge_of)?;
    let Some(there) = known.into_iter().find(|n| *n.name == *new.name) else {
        return create_new(call, new, NetworkBeginning::Defined).await;
    };
    let hosts = keep_hosts(call, &mut new)?;
    let uuid = network_uuid(&there);
    if new.uuid != Some(uuid) {
        let text = format!("network '{}' already exists with uuid {uuid}", new.name);
        return Err(failed(Code::OperationFailed, text));
    }
    let config = said_anew(&there, &new)?;
    let session = &call.session;
    let (engine, context) = (&session.front.engine, &session.context);
    let request =
        UpdateNetwork { description: new.description, config, if_version: Some(there.spec_version) };
    let project = &call.opened()?.project;
    ended(engine.network_define(context, project, &there.name, request).await?).await?;
    reserve_all(call, &new.name, &hosts).await?;
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

/// Makes a network by a document, until it is stopped: a new one, or one that is defined and not active.
async fn create_text(call: &Call, text: &str) -> Answered {
    let known = all(call)?;
    let bridge_of = |name: &str| known.iter().find(|n| *n.name == *name).map(|n| n.interface().to_owned());
    let mut new: NewNetwork = read::network_again(text, &bridge_of)?;
    let session = &call.session;
    let (engine, context, project) = (&session.front.engine, &session.context, &call.opened()?.project);
    let Some(there) = known.into_iter().find(|n| *n.name == *new.name) else {
        return create_new(call, new, NetworkBeginning::Transient).await;
    };
    let uuid = network_uuid(&there);
    // One that went, but for what uses it, may come again as another.
    let again = there.life.transient && !there.is_active() && new.uuid.is_none();
    if new.uuid != Some(uuid) && !again {
        let text = format!("network '{}' already exists with uuid {uuid}", new.name);
        return Err(failed(Code::OperationFailed, text));
    }
    if there.is_active() {
        let text = format!("network is already active as '{}'", new.name);
        return Err(failed(Code::OperationInvalid, text));
    }
    keep_hosts(call, &mut new)?;
    let config = said_anew(&there, &new)?;
    ended(engine.network_start_as(context, project, &new.name, &config).await?).await?;
    one(&*find(call, &new.name)?)
}

/// `NETWORK_CREATE_XML`
pub async fn create_xml(call: Call) -> Answered {
    let text = call.arguments(|r| r.string())?;
    create_text(&call, &text).await
}

/// `NETWORK_CREATE_XML_FLAGS`
pub async fn create_xml_flags(call: Call) -> Answered {
    let (text, flags) = call.arguments(|r| Ok((r.string()?, r.u32()?)))?;
    // Checked against the schema.
    call.known_flags(flags, 1)?;
    create_text(&call, &text).await
}

fn only(call: &Call) -> Result<Row<Network>, VirError> {
    find_uuid(call, call.arguments(Named::read)?.uuid)
}

/// `NETWORK_CREATE`: starts it.
pub async fn create(call: Call) -> Answered {
    let network = only(&call)?;
    if network.is_active() {
        return Err(failed(Code::OperationInvalid, "network is already active"));
    }
    let session = &call.session;
    let (engine, context) = (&session.front.engine, &session.context);
    ended(engine.network_start(context, &call.opened()?.project, &network.name).await?).await?;
    Ok(nothing())
}

/// `NETWORK_DESTROY`
pub async fn destroy(call: Call) -> Answered {
    let network = only(&call)?;
    if !network.is_active() {
        let text = format!("network '{}' is not active", &*network.name);
        return Err(failed(Code::OperationInvalid, text));
    }
    let session = &call.session;
    let (engine, context) = (&session.front.engine, &session.context);
    ended(engine.network_stop(context, &call.opened()?.project, &network.name).await?).await?;
    Ok(nothing())
}

/// `NETWORK_UNDEFINE`
pub async fn undefine(call: Call) -> Answered {
    let network = only(&call)?;
    if network.life.transient {
        return Err(failed(Code::OperationInvalid, "can't undefine transient network"));
    }
    let session = &call.session;
    let (engine, context) = (&session.front.engine, &session.context);
    ended(engine.network_undefine(context, &call.opened()?.project, &network.name).await?).await?;
    Ok(nothing())
}

/// `NETWORK_SET_AUTOSTART`
pub async fn set_autostart(call: Call) -> Answered {
    let (named, wanted) = call.arguments(|r| Ok((Named::read(r)?, r.i32()?)))?;
    let network = find_uuid(&call, named.uuid)?;
    if network.life.transient {
        return Err(failed(Code::OperationInvalid, "cannot set autostart for transient network"));
    }
    let wanted = wanted != 0;
    if wanted != network.autostart() {
        let session = &call.session;
        let (engine, context) = (&session.front.engine, &session.context);
        let project = &call.opened()?.project;
        ended(engine.network_set_autostart(context, project, &network.name, wanted).await?).await?;
    }
    Ok(nothing())
}

/// A port: an interface of a guest that runs.
struct Port {
    uuid: Uuid,
    mac: String,
    guest: Arc<InstanceView>,
}

fn ports(call: &Call, network: &Network) -> Result<Vec<Port>, VirError> {
    let mut all = vec![];
    if !network.is_active() {
        return Ok(all);
    }
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
        NetworkKind::HostBridge => {
            Element::new("plug").with("type", "bridge").with_some("bridge", network.config.get("parent"))
        }
        _ => Element::new("plug")
            .with("type", "direct")
            .with_some("dev", network.config.get("parent"))
            .with("mode", network.config.get("mode").map_or("bridge", String::as_str)),
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
