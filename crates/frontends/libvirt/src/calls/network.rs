//! Networks.

use super::{Answered, Named, flag, int, listed, names as some_names, text};
use crate::{
    error::{Code, Part, VirError},
    network_uuid,
    session::Call,
    xdr::Writer,
    xml::{self, network::Side},
};
use karst_engine::{InstanceView, Row};
use karst_model::{network::Network, uplink::NetworkKind};
use std::{net::IpAddr, sync::Arc};

/// Lengths of a network's prefixes.
pub struct Prefixes {
    v4: u8,
    v6: u8,
}

impl Prefixes {
    /// Of an address.
    pub fn of(&self, address: IpAddr) -> u8 {
        if address.is_ipv4() { self.v4 } else { self.v6 }
    }
}

/// Prefixes of a network by name.
///
/// # Errors
/// No network; invalid, when its configuration is.
pub fn prefixes(call: &Call, name: &str) -> Result<Prefixes, VirError> {
    let network = find(call, name)?;
    if network.kind != NetworkKind::Bridge {
        return Ok(Prefixes { v4: 32, v6: 128 });
    }
    let spec = network.bridge()?;
    Ok(Prefixes {
        v4: spec.ipv4.map_or(32, |n| n.prefix_len()),
        v6: spec.ipv6.map_or(128, |n| n.prefix_len()),
    })
}

/// All guests of the connection's project, of either kind: networks are of both.
pub(super) fn guests(call: &Call) -> Result<Vec<Arc<InstanceView>>, VirError> {
    let session = &call.session;
    Ok(session.front.engine.instances(&session.context, &session.opened()?.project)?)
}

fn missing(text: String) -> VirError {
    VirError::new(Code::NoNetwork, Part::Network, text)
}

pub(super) fn all(call: &Call) -> Result<Vec<Row<Network>>, VirError> {
    let session = &call.session;
    let mut all = session.front.engine.networks(&session.context, &session.opened()?.project)?;
    // Libvirt has no network that is an interface of the host itself.
    all.retain(|n| n.kind != NetworkKind::Physical);
    Ok(all)
}

pub(super) fn find(call: &Call, name: &str) -> Result<Row<Network>, VirError> {
    let found = all(call)?.into_iter().find(|n| &*n.name == name);
    found.ok_or_else(|| missing(format!("no network with matching name '{name}'")))
}

pub(super) fn find_uuid(call: &Call, uuid: uuid::Uuid) -> Result<Row<Network>, VirError> {
    let found = all(call)?.into_iter().find(|n| network_uuid(n) == uuid);
    found.ok_or_else(|| missing(format!("no network with matching uuid '{uuid}'")))
}

fn only(call: &Call) -> Result<Row<Network>, VirError> {
    find_uuid(call, call.arguments(Named::read)?.uuid)
}

fn write(w: &mut Writer, network: &Network) {
    w.string(&network.name).uuid(network_uuid(network));
}

pub(super) fn one(network: &Network) -> Answered {
    let mut w = Writer::new();
    write(&mut w, network);
    Ok(w.finish().into())
}

/// `CONNECT_LIST_ALL_NETWORKS`
pub async fn list(call: Call) -> Answered {
    let (need_results, flags) = call.arguments(|r| Ok((r.i32()?, r.u32()?)))?;
    call.known_flags(flags, 0x3f)?;
    let wanted = |n: &Network| {
        let pairs = [(n.is_active(), 0x2, 0x1), (!n.life.transient, 0x4, 0x8), (n.autostart(), 0x10, 0x20)];
        // Of each pair neither is asked for, or what it is.
        pairs
            .into_iter()
            .all(|(is, yes, no)| flags & (yes | no) == 0 || flags & (if is { yes } else { no }) != 0)
    };
    let found: Vec<_> = all(&call)?.into_iter().filter(|n| wanted(n)).collect();
    listed(found, need_results, |w, network| write(w, &network))
}

/// Those that are active, or those that are not.
fn some(call: &Call, active: bool) -> Result<Vec<Row<Network>>, VirError> {
    Ok(all(call)?.into_iter().filter(|n| n.is_active() == active).collect())
}

/// `CONNECT_NUM_OF_NETWORKS`
pub async fn count(call: Call) -> Answered {
    Ok(int(some(&call, true)?.len() as i32))
}

/// `CONNECT_NUM_OF_DEFINED_NETWORKS`: those that are not active.
pub async fn count_defined(call: Call) -> Answered {
    Ok(int(some(&call, false)?.len() as i32))
}

/// `CONNECT_LIST_NETWORKS`
pub async fn names(call: Call) -> Answered {
    let max = call.arguments(|r| r.i32())?;
    some_names(some(&call, true)?.iter().map(|n| &*n.name), max)
}

/// `CONNECT_LIST_DEFINED_NETWORKS`
pub async fn defined_names(call: Call) -> Answered {
    let max = call.arguments(|r| r.i32())?;
    some_names(some(&call, false)?.iter().map(|n| &*n.name), max)
}

/// `NETWORK_LOOKUP_BY_NAME`
pub async fn by_name(call: Call) -> Answered {
    one(&*find(&call, &call.arguments(|r| r.string())?)?)
}

/// `NETWORK_LOOKUP_BY_UUID`
pub async fn by_uuid(call: Call) -> Answered {
    one(&*find_uuid(&call, call.arguments(|r| r.uuid())?)?)
}

/// `NETWORK_GET_XML_DESC`
pub async fn xml(call: Call) -> Answered {
    let (named, flags) = call.arguments(|r| Ok((Named::read(r)?, r.u32()?)))?;
    call.known_flags(flags, 1)?;
    let network = find_uuid(&call, named.uuid)?;
    // VIR_NETWORK_XML_INACTIVE
    let side = if flags & 1 != 0 { Side::Defined } else { Side::Running };
    Ok(text(&xml::network::document_of(&network, &guests(&call)?, side)?))
}

/// `NETWORK_GET_AUTOSTART`
pub async fn autostart(call: Call) -> Answered {
    Ok(flag(only(&call)?.autostart()))
}

/// `NETWORK_GET_BRIDGE_NAME`: its network's name, unless another project's network has that already.
pub async fn bridge(call: Call) -> Answered {
    let network = only(&call)?;
    if network.kind == NetworkKind::HostBridge
        && let Some(bridge) = network.config.get("parent")
    {
        return Ok(text(bridge));
    }
    if network.kind != NetworkKind::Bridge {
        let text = format!("network '{}' does not have a bridge name.", &*network.name);
        return Err(VirError::new(Code::InternalError, Part::Network, text));
    }
    Ok(text(network.interface()))
}

/// `NETWORK_IS_ACTIVE`
pub async fn is_active(call: Call) -> Answered {
    Ok(flag(only(&call)?.is_active()))
}

/// `NETWORK_IS_PERSISTENT`
pub async fn is_persistent(call: Call) -> Answered {
    Ok(flag(!only(&call)?.life.transient))
}

/// `NETWORK_GET_DHCP_LEASES`
pub async fn leases(call: Call) -> Answered {
    let (named, mac, need_results, flags) =
        call.arguments(|r| Ok((Named::read(r)?, r.option(|r| r.string())?, r.i32()?, r.u32()?)))?;
    call.known_flags(flags, 0)?;
    let network = find_uuid(&call, named.uuid)?;
    let session = &call.session;
    let project = &session.opened()?.project;
    let prefixes = prefixes(&call, &network.name)?;
    let mut all = session.front.engine.network_leases(&session.context, project, &network.name).await?;
    if let Some(mac) = mac {
        all.retain(|l| l.mac.eq_ignore_ascii_case(&mac));
    }
    listed(all, need_results, |w, lease| {
        // 0 is what libvirt says of one that never ends.
        let expires = lease.expires.unwrap_or_default();
        w.string(&network.name)
            .i64(expires)
            .i32(i32::from(lease.address.is_ipv6()))
            .optional(Some(&lease.mac));
        w.optional(None).string(&lease.address.to_string()).u32(u32::from(prefixes.of(lease.address)));
        w.optional(Some(lease.hostname.as_str()).filter(|h| !h.is_empty())).optional(None);
    })
}
