//! NICs of containers that `lxc-start` does not make: all kinds but ports of bridges, and every NIC that comes while the
//! container runs.
//!
//! At a start they are made as soon as the container's network namespace is there, before its init is executed; after a
//! reboot from inside again. A cable has its host's end under a recorded name; what lives in the container's network
//! namespace alone ends with it. An interface of the host that a container has must come back whatever ends the container:
//! its namespace is held by a mount in the state directory until the interface was taken out of it.

use crate::record::{Home, Nic};
use karst_guest::{ResolvedLink, ResolvedNic};
use karst_host::{
    link::{self, Link},
    mount,
    netns::{self, within},
    nic::{self, GuestEnd},
    sysctl,
};
use karst_model::{Error, ErrorKind, Result, device::ParentLink};
use std::{
    fs::File,
    net::IpAddr,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

/// Is it `lxc-start` that makes it at a start?
pub(crate) fn by_lxc(nic: &ResolvedNic) -> bool {
    nic.bridge().is_some()
}

fn held(dir: &Path) -> PathBuf {
    dir.join("net")
}

fn field(nic: &ResolvedNic, key: &str) -> String {
    format!("devices.{}.{key}", nic.name)
}

/// The network namespace that is held, if one is.
fn held_namespace(dir: &Path) -> Result<Option<OwnedFd>> {
    let at = held(dir);
    let there = karst_host::mountns::entries(None)?.into_iter().any(|m| m.at == at);
    Ok(if there { Some(File::open(at)?.into()) } else { None })
}

fn hold(dir: &Path, namespace: BorrowedFd<'_>) -> Result<()> {
    if held_namespace(dir)?.is_some() {
        return Ok(());
    }
    let at = held(dir);
    File::create(&at)?;
    Ok(mount::bind(namespace, &at)?)
}

fn let_go(dir: &Path) -> Result<()> {
    let at = held(dir);
    mount::unmount(&at, true)?;
    match std::fs::remove_file(&at) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e.into()),
        _ => Ok(()),
    }
}

/// The interface of the host that a NIC names; a VLAN of it must be one by itself.
fn parent(nic: &ResolvedNic, parent: &ParentLink) -> Result<Link> {
    let missing = |name: &str| {
        Error::not_found(format!("this host has no interface {name:?} now")).at(field(nic, "parent"))
    };
    match parent.vlan {
        None => link::get(&parent.parent)?.ok_or_else(|| missing(&parent.parent)),
        Some(vlan) => {
            let name = format!("{}.{vlan}", parent.parent);
            if name.len() > 15 {
                return Err(missing(&name));
            }
            link::get(&name)?.ok_or_else(|| {
                Error::unsupported(format!(
                    "VLAN {vlan} of {0:?} must be an interface of the host to be shared; make it: ip link add link {0} name \
                     {name} type vlan id {vlan}",
                    parent.parent
                ))
                .at(field(nic, "vlan"))
            })
        }
    }
}

/// What must be known of an interface before a container gets it.
///
/// # Errors
/// Not found.
pub(crate) fn home(nic: &ResolvedNic) -> Result<Option<Home>> {
    let ResolvedLink::Physical(link @ ParentLink { vlan: None, .. }) = &nic.link else { return Ok(None) };
    let found = parent(nic, link)?;
    Ok(Some(Home {
        name: found.name,
        mac: found.mac.unwrap_or_default(),
        permanent: found.permanent,
        mtu: found.mtu,
        up: found.up,
    }))
}

/// Brings the host's side of a port that `lxc-start` made to what is wanted beyond that.
///
/// # Errors
/// Conflict when the name is taken, unsupported VLANs.
pub(crate) fn settle(nic: &ResolvedNic) -> Result<()> {
    let name = &nic.host_interface;
    if let Some(other) = &nic.host_name {
        nic::add_name(name, other).map_err(|e| e.at(field(nic, "host_name")))?;
    }
    if let Some(packets) = nic.queue_length {
        nic::set_queue_length(name, packets)?;
    }
    if let (Some(vlan), Some(_)) = (nic.vlans.untagged, nic.bridge()) {
        nic::add_port_vlan(name, vlan, true).map_err(|e| e.at(field(nic, "vlan")))?;
    }
    if let Some(bridge) = nic.bridge().filter(|_| nic.vlans.untagged.is_some() || nic.vlans.closed) {
        nic::leave_default_vlan(name, bridge, nic.vlans.untagged).map_err(|e| e.at(field(nic, "vlan")))?;
    }
    for vlan in nic.vlans.tagged.iter().filter(|v| nic.vlans.untagged != Some(**v)) {
        nic::add_port_vlan(name, *vlan, false).map_err(|e| e.at(field(nic, "vlan.tagged")))?;
    }
    Ok(())
}

/// Gives a container a NIC. Nothing is left of one that could not be made.
///
/// # Errors
/// What the host lacks, conflict when a name or interface is taken; with the field.
pub(crate) fn plug(dir: &Path, namespace: BorrowedFd<'_>, nic: &Nic) -> Result<()> {
    let Some(spec) = &nic.spec else { return Ok(()) };
    let made = make(dir, namespace, nic, spec).map_err(|e| match e.field {
        None => e.at(format!("devices.{}", spec.name)),
        Some(_) => e,
    });
    if made.is_err() {
        // What cannot be undone now is undone at the end of the guest: its record tells of it.
        if let Err(e) = unplug(dir, namespace, nic) {
            tracing::warn!(nic = %spec.name, error = %e, "half a NIC is left until the guest ends");
        }
    }
    made
}

fn make(dir: &Path, namespace: BorrowedFd<'_>, nic: &Nic, spec: &ResolvedNic) -> Result<()> {
    let (host, name) = (spec.host_interface.as_str(), spec.guest_name.as_str());
    let end = GuestEnd { namespace, name, mac: &spec.mac, mtu: spec.mtu };
    match &spec.link {
        ResolvedLink::Bridge(bridge) => {
            nic::create_cable(host, &end)?;
            // A bridge takes the lowest address of its ports as its own: this one is the highest.
            let mut mac = link::parse_mac(&spec.mac)?;
            mac[0] = 0xfe;
            link::set_mac(host, mac)?;
            link::set_master(host, Some(bridge))?;
            settle(spec)?;
            link::set_up(host, true)?;
        }
        ResolvedLink::PointToPoint(routes) => {
            nic::create_cable(host, &end)?;
            settle(spec)?;
            link::set_up(host, true)?;
            let index = link::get(host)?.map_or(0, |l| l.index);
            let routes: Vec<_> = routes.iter().map(|n| (n.network(), n.prefix_len())).collect();
            link::set_routes(index, &routes)?;
        }
        ResolvedLink::Routed { link: routed, routes } => {
            let uplink = routed.parent.as_ref().map(|p| parent(spec, p)).transpose()?;
            demand_forwarding(spec, uplink.as_ref(), &routed.addresses)?;
            nic::create_cable(host, &end)?;
            settle(spec)?;
            let (v4, v6) = families(&routed.addresses);
            // It sends from what is routed to it, and from nothing else.
            sysctl::set(&["net", "ipv4", "conf", host, "rp_filter"], "1")?;
            sysctl::set(&["net", "ipv4", "conf", host, "forwarding"], "1")?;
            link::set_up(host, true)?;
            if v4 {
                link::add_address(host, routed.host.0, 32)?;
            }
            if v6 {
                sysctl::set(&["net", "ipv6", "conf", host, "forwarding"], "1")?;
                link::add_address(host, routed.host.1, 128)?;
            }
            let index = link::get(host)?.map_or(0, |l| l.index);
            let own = routed.addresses.iter().map(|a| (*a, if a.is_ipv4() { 32 } else { 128 }));
            let routes: Vec<_> = own.chain(routes.iter().map(|n| (n.network(), n.prefix_len()))).collect();
            link::set_routes(index, &routes)?;
            if let Some(uplink) = &uplink {
                routed.addresses.iter().try_for_each(|a| nic::set_proxy(&uplink.name, *a, true))?;
            }
        }
        ResolvedLink::Macvlan(link) => nic::create_macvlan(&parent(spec, link)?, link.mode, &end)?,
        ResolvedLink::Physical(ParentLink { parent: name, vlan: Some(vlan), mode }) => {
            let below = parent(spec, &ParentLink { parent: name.clone(), vlan: None, mode: *mode })?;
            let mac =
                if spec.mac.is_empty() { below.mac.clone().unwrap_or_default() } else { spec.mac.clone() };
            nic::create_vlan(&below, *vlan, &GuestEnd { mac: &mac, ..end })
                .map_err(|e| e.at(field(spec, "vlan")))?;
        }
        ResolvedLink::Physical(link) => lend(dir, namespace, nic, spec, link)?,
        ResolvedLink::User {} => {
            return Err(
                Error::unsupported("virtual machines have NICs of this type").at(field(spec, "nictype"))
            );
        }
    }
    within(namespace, || {
        link::set_up(name, true)?;
        if let ResolvedLink::Routed { link: routed, .. } = &spec.link {
            for address in &routed.addresses {
                link::add_address(name, *address, if address.is_ipv4() { 32 } else { 128 })?;
            }
            let index = link::get(name)?.map_or(0, |l| l.index);
            let (v4, v6) = families(&routed.addresses);
            let gateways = [
                (v4 && routed.gateways.0, IpAddr::V4(routed.host.0), "ipv4.gateway"),
                (v6 && routed.gateways.1, IpAddr::V6(routed.host.1), "ipv6.gateway"),
            ];
            for (_, gateway, key) in gateways.into_iter().filter(|(on, ..)| *on) {
                nic::add_default_route(index, gateway).map_err(|e| e.at(field(spec, key)))?;
            }
        }
        Ok(())
    })
}

fn families(addresses: &[IpAddr]) -> (bool, bool) {
    (addresses.iter().any(IpAddr::is_ipv4), addresses.iter().any(IpAddr::is_ipv6))
}

/// The host's own settings are its administrator's: what is missing is said, not changed.
fn demand_forwarding(spec: &ResolvedNic, uplink: Option<&Link>, addresses: &[IpAddr]) -> Result<()> {
    let Some(uplink) = uplink else { return Ok(()) };
    let (v4, v6) = families(addresses);
    let wanted = [
        (v4, ["net", "ipv4", "conf", &uplink.name, "forwarding"]),
        (v6, ["net", "ipv6", "conf", &uplink.name, "forwarding"]),
        (v6, ["net", "ipv6", "conf", &uplink.name, "proxy_ndp"]),
    ];
    for (_, key) in wanted.into_iter().filter(|(on, _)| *on) {
        if sysctl::get(&key)?.as_deref() != Some("1") {
            return Err(Error::conflict(format!(
                "the host does not pass packets on from {:?}; its administrator sets {}=1",
                uplink.name,
                key.join("/")
            ))
            .at(field(spec, "parent")));
        }
    }
    Ok(())
}

/// Hands an interface of the host over.
fn lend(
    dir: &Path,
    namespace: BorrowedFd<'_>,
    nic: &Nic,
    spec: &ResolvedNic,
    link: &ParentLink,
) -> Result<()> {
    if nic.home.is_none() {
        return Err(Error::internal("the interface cannot be given away", "its home was not recorded"));
    }
    let found = parent(spec, link)?;
    hold(dir, namespace)?;
    link::set_up(&found.name, false)?;
    if !spec.mac.is_empty() {
        link::set_mac(&found.name, link::parse_mac(&spec.mac)?)?;
    }
    if let Some(mtu) = spec.mtu {
        link::set_mtu(&found.name, mtu)?;
    }
    nic::hand_over(found.index, namespace, &spec.guest_name)
}

/// Finds a link in the current network namespace, whatever the guest has called it meanwhile.
fn find(nic: &Nic, spec: &ResolvedNic) -> Result<Option<Link>> {
    let kind = match &spec.link {
        ResolvedLink::Macvlan(_) => Some("macvlan"),
        ResolvedLink::Physical(ParentLink { vlan: Some(_), .. }) => Some("vlan"),
        _ => None,
    };
    let all: Vec<Link> = link::list()?
        .into_iter()
        .filter(|l| l.mac.is_some() && kind.is_none_or(|k| l.kind.as_deref() == Some(k)))
        .collect();
    let permanent = nic.home.as_ref().and_then(|h| h.permanent.as_deref());
    let macs = [Some(spec.mac.as_str()), nic.home.as_ref().map(|h| h.mac.as_str())];
    let by_address = |l: &&Link| macs.iter().flatten().any(|m| l.mac.as_deref() == Some(m));
    Ok(all
        .iter()
        .find(|l| permanent.is_some() && l.permanent.as_deref() == permanent)
        .or_else(|| all.iter().find(by_address))
        .or_else(|| all.iter().find(|l| l.name == spec.guest_name))
        .cloned())
}

/// Takes a NIC out of a running container; fine when it is not there.
///
/// # Errors
/// Internal; conflict when the name of a host's interface is taken meanwhile.
pub(crate) fn unplug(dir: &Path, namespace: BorrowedFd<'_>, nic: &Nic) -> Result<()> {
    let Some(spec) = &nic.spec else { return remove(&nic.host_interface) };
    match &spec.link {
        ResolvedLink::Bridge(_) | ResolvedLink::PointToPoint(_) | ResolvedLink::Routed { .. } => {
            forget_proxies(spec)?;
            remove(&spec.host_interface)
        }
        // It was never made.
        ResolvedLink::User {} => Ok(()),
        ResolvedLink::Physical(ParentLink { vlan: None, .. }) => bring_home(dir, namespace, nic, spec),
        ResolvedLink::Macvlan(_) | ResolvedLink::Physical(_) => {
            within(namespace, || match find(nic, spec)? {
                Some(link) => remove(&link.name),
                None => Ok(()),
            })
        }
    }
}

/// Deletes a link; fine when there is none.
pub(crate) fn remove(name: &str) -> Result<()> {
    match link::delete(name) {
        Err(e) if e.is(ErrorKind::NotFound) => Ok(()),
        other => other,
    }
}

fn forget_proxies(spec: &ResolvedNic) -> Result<()> {
    let ResolvedLink::Routed { link: routed, .. } = &spec.link else { return Ok(()) };
    let Some(ParentLink { parent, vlan, .. }) = &routed.parent else { return Ok(()) };
    let name = vlan.map_or_else(|| parent.clone(), |v| format!("{parent}.{v}"));
    routed.addresses.iter().try_for_each(|a| nic::set_proxy(&name, *a, false))
}

fn bring_home(dir: &Path, namespace: BorrowedFd<'_>, nic: &Nic, spec: &ResolvedNic) -> Result<()> {
    let Some(home) = &nic.home else { return Ok(()) };
    let host = netns::own()?;
    let found = within(namespace, || {
        let Some(link) = find(nic, spec)? else { return Ok(false) };
        link::set_up(&link.name, false)?;
        if let Ok(mac) = link::parse_mac(&home.mac) {
            link::set_mac(&link.name, mac)?;
        }
        nic::hand_over(link.index, host.as_fd(), &home.name)?;
        Ok(true)
    })?;
    if found || link::exists(&home.name)? {
        link::set_mtu(&home.name, home.mtu)?;
        link::set_up(&home.name, home.up)?;
    }
    let others = held(dir).exists() && !found;
    if others {
        tracing::debug!(interface = %home.name, "an interface was not with the guest any more");
    }
    Ok(())
}

/// After the end of a container: interfaces of the host come back, and what is on the host for it goes. Cables go by their
/// recorded names, elsewhere.
///
/// # Errors
/// As [`unplug`]; everything is tried.
pub(crate) fn clear(dir: &Path, nics: &[Nic]) -> Result<()> {
    let mut outcome = Ok(());
    for spec in nics.iter().filter_map(|n| n.spec.as_ref()) {
        outcome = outcome.and(forget_proxies(spec));
    }
    let lent: Vec<&Nic> = nics.iter().filter(|n| n.home.is_some()).collect();
    if lent.is_empty() && !held(dir).exists() {
        return outcome;
    }
    if let Some(namespace) = held_namespace(dir)? {
        for nic in lent {
            if let Some(spec) = &nic.spec {
                outcome = outcome.and(bring_home(dir, namespace.as_fd(), nic, spec));
            }
        }
    }
    outcome.and(let_go(dir))
}

/// After a reboot from inside: the container has a new network namespace, with what `lxc-start` makes of what was wanted at
/// its start.
///
/// # Errors
/// As [`plug`]; everything is tried.
pub(crate) fn again(dir: &Path, namespace: BorrowedFd<'_>, nics: &[Nic], gone: &[String]) -> Result<()> {
    let mut outcome = clear(dir, nics);
    for name in gone {
        outcome = outcome.and(remove(name));
    }
    for nic in nics {
        outcome = outcome.and(match &nic.spec {
            Some(_) if nic.plugged => remove(&nic.host_interface).and_then(|()| plug(dir, namespace, nic)),
            Some(spec) => settle(spec),
            None => Ok(()),
        });
    }
    outcome
}

/// Brings the NICs of a running container to what is wanted. `note` is called with what is there from now on: before a NIC
/// comes, and after one has gone.
///
/// # Errors
/// As [`plug`] and [`unplug`].
pub(crate) fn update(
    dir: &Path,
    namespace: BorrowedFd<'_>,
    now: &mut Nics,
    wanted: &[ResolvedNic],
    note: &mut dyn FnMut(&Nics) -> Result<()>,
) -> Result<()> {
    let stays = |nic: &Nic| wanted.iter().any(|w| same(nic, w));
    let leaving: Vec<Nic> = now.nics.iter().filter(|n| !stays(n)).cloned().collect();
    for nic in leaving {
        if !nic.plugged && !now.gone.contains(&nic.host_interface) {
            now.gone.push(nic.host_interface.clone());
        }
        unplug(dir, namespace, &nic)?;
        now.nics.retain(|n| *n != nic);
        note(now)?;
    }
    if now.nics.iter().all(|n| n.home.is_none()) && held(dir).exists() {
        let_go(dir)?;
    }
    for spec in wanted {
        if now.nics.iter().any(|n| same(n, spec)) {
            continue;
        }
        let nic = Nic { plugged: true, home: home(spec)?, ..Nic::of(spec) };
        now.nics.push(nic.clone());
        note(now)?;
        if let Err(e) = plug(dir, namespace, &nic) {
            now.nics.retain(|n| *n != nic);
            note(now)?;
            return Err(e);
        }
    }
    Ok(())
}

/// What is plugged.
#[derive(Debug, Clone)]
pub(crate) struct Nics {
    pub(crate) nics: Vec<Nic>,
    /// Ports that `lxc-start` makes at each reboot though they were unplugged.
    pub(crate) gone: Vec<String>,
}

/// Is this NIC there as it is wanted? Of one from a start by an earlier version less is known.
fn same(nic: &Nic, wanted: &ResolvedNic) -> bool {
    let plain = |n: &ResolvedNic| ResolvedNic {
        name: String::new(),
        slot: String::new(),
        pci: None,
        boot_priority: 0,
        disconnected: false,
        model: Default::default(),
        ..n.clone()
    };
    match &nic.spec {
        Some(spec) => plain(spec) == plain(wanted),
        None => {
            nic.guest_name == wanted.guest_name
                && nic.mac == wanted.mac
                && nic.host_interface == wanted.host_interface
        }
    }
}
