//! The connection itself, and what is asked of the host.

use super::{Answered, flag, int, nothing as empty, text};
use crate::{
    error::{Code, Part, VirError},
    session::{Call, Driver, Opened},
    xdr::Writer,
    xml,
};
use karst_model::{
    access::Permission,
    node::{AcceleratorKind, HostFacts},
    project::DEFAULT_PROJECT,
};
use percent_encoding::percent_decode_str;

/// The release of libvirt whose protocol is spoken, as `virGetVersion` counts.
const LIBRARY: u64 = 9_000_000;
/// `VIR_CONNECT_RO` and `VIR_CONNECT_NO_ALIASES`.
const READ_ONLY: u32 = 1;
const NO_ALIASES: u32 = 2;
/// Most CPUs of a guest that clients are told.
pub(super) const MAX_VCPUS: i32 = 288;
/// The feature of descriptors beside calls.
const DESCRIPTORS: i32 = 8;
/// Features that clients ask for before they rely on them: descriptors (where the connection passes any), strings in typed parameters, keepalive, events by
/// callback and of the connection's end, network updates in the right order.
const FEATURES: [i32; 6] = [DESCRIPTORS, 9, 10, 14, 15, 16];

/// What the host of this connection last said of itself.
pub fn facts(call: &Call) -> Result<HostFacts, VirError> {
    let all = call.session.front.engine.host_facts(&call.session.context)?;
    Ok(all.into_iter().next().map(|(_, facts)| facts).unwrap_or_default())
}

/// `VERSION` as one number: major * 1,000,000 + minor * 1,000 + release.
fn version_number(text: &str) -> u64 {
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let mut parts = text[..end].split('.').map(|p| p.parse::<u64>().unwrap_or(0));
    let mut next = || parts.next().unwrap_or(0);
    next() * 1_000_000 + next() * 1000 + next()
}

/// Parses what clients open: `qemu:///system`, `lxc:///system`, with `?project=NAME`; nothing is the former.
fn parse_uri(uri: Option<&str>) -> Result<Opened, VirError> {
    let given = uri.unwrap_or("qemu:///system");
    let unknown = || VirError::new(Code::NoConnect, Part::None, given);
    let (scheme, rest) = given.split_once(':').ok_or_else(unknown)?;
    let driver = match scheme.split('+').next() {
        Some("qemu") => Driver::Qemu,
        Some("lxc") => Driver::Lxc,
        _ => return Err(unknown()),
    };
    let rest = rest.strip_prefix("//").ok_or_else(unknown)?;
    let (place, query) = rest.split_once('?').unwrap_or((rest, ""));
    let path = place.find('/').map_or("", |at| &place[at..]);
    if !matches!((driver, path), (_, "/system") | (Driver::Lxc, "/" | "")) {
        let text = format!("{given}: this host has qemu:///system and lxc:///system");
        return Err(VirError::new(Code::NoConnect, Part::None, text));
    }
    let mut project = DEFAULT_PROJECT.to_owned();
    for pair in query.split(['&', ';']).filter(|p| !p.is_empty()) {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        // Others are for the client's end of the connection.
        if key == "project" {
            let decoded = percent_decode_str(value).decode_utf8();
            project = decoded.map_err(|_| VirError::argument("the project is no UTF-8 text"))?.into_owned();
        }
    }
    Ok(Opened { driver, project, uri: given.to_owned() })
}

/// `CONNECT_OPEN`
pub async fn open(call: Call) -> Answered {
    let (uri, flags) = call.arguments(|r| Ok((r.option(|r| r.string())?, r.u32()?)))?;
    call.known_flags(flags, READ_ONLY | NO_ALIASES)?;
    let opened = parse_uri(uri.as_deref().filter(|u| !u.is_empty()))?;
    let session = &call.session;
    session.front.engine.project(&session.context, &opened.project, Permission::ProjectView)?;
    session.open(opened)?;
    if flags & READ_ONLY != 0 {
        session.restrict();
    }
    Ok(empty())
}

/// `CONNECT_CLOSE`
pub async fn close(call: Call) -> Answered {
    Ok(empty().and_then_end(&call.session))
}

/// Calls that change nothing here.
pub async fn nothing(call: Call) -> Answered {
    call.arguments(|_| Ok(()))?;
    Ok(empty())
}

/// `AUTH_LIST`: who may open the socket may use it, and who came over TLS is somebody already ([`crate::auth`]).
pub async fn auth_list(call: Call) -> Answered {
    call.arguments(|_| Ok(()))?;
    let mut w = Writer::new();
    w.array([0u32], |w, kind| {
        w.u32(kind);
    });
    Ok(w.finish().into())
}

/// `CONNECT_SUPPORTS_FEATURE`
pub async fn supports_feature(call: Call) -> Answered {
    let feature = call.arguments(|r| r.i32())?;
    let here = feature != DESCRIPTORS || call.session.passes_descriptors;
    Ok(flag(here && FEATURES.contains(&feature)))
}

/// `CONNECT_GET_TYPE`
pub async fn get_type(call: Call) -> Answered {
    Ok(text(match call.opened()?.driver {
        Driver::Qemu => "QEMU",
        Driver::Lxc => "LXC",
    }))
}

/// `CONNECT_GET_VERSION`: of what runs the guests.
pub async fn version(call: Call) -> Answered {
    let facts = facts(&call)?;
    let version = match call.opened()?.driver {
        Driver::Qemu => facts.qemu,
        Driver::Lxc => facts.lxc,
    };
    let mut w = Writer::new();
    w.u64(version_number(&version.unwrap_or_default()));
    Ok(w.finish().into())
}

/// `CONNECT_GET_LIB_VERSION`
pub async fn lib_version(_: Call) -> Answered {
    let mut w = Writer::new();
    w.u64(LIBRARY);
    Ok(w.finish().into())
}

/// `CONNECT_GET_HOSTNAME`
pub async fn hostname(call: Call) -> Answered {
    Ok(text(&facts(&call)?.hostname))
}

/// `CONNECT_GET_URI`
pub async fn uri(call: Call) -> Answered {
    Ok(text(&call.opened()?.uri))
}

/// `CONNECT_IS_SECURE`: a unix socket is, and so is TLS.
pub async fn is_secure(_: Call) -> Answered {
    Ok(flag(true))
}

/// `CONNECT_GET_MAX_VCPUS`
pub async fn max_vcpus(call: Call) -> Answered {
    call.arguments(|r| r.option(|r| r.string()))?;
    Ok(int(MAX_VCPUS))
}

/// `NODE_GET_INFO`: one socket and one NUMA cell that have all CPUs, as long as hosts do not say more.
pub async fn node_info(call: Call) -> Answered {
    let facts = facts(&call)?;
    let cpus = facts.cpus.max(1) as i32;
    let mut w = Writer::new();
    w.characters(&facts.architecture, 32).u64(facts.memory / 1024).i32(cpus);
    // MHz (not known), cells, sockets, cores, threads.
    w.i32(0).i32(1).i32(1).i32(cpus).i32(1);
    Ok(w.finish().into())
}

/// `NODE_GET_CPU_MAP`: those that a host tells are all on line.
pub async fn cpu_map(call: Call) -> Answered {
    let (need_map, _, flags) = call.arguments(|r| Ok((r.i32()?, r.i32()?, r.u32()?)))?;
    call.known_flags(flags, 0)?;
    let cpus = facts(&call)?.cpus;
    let mut map = vec![0u8; cpus.div_ceil(8) as usize];
    (0..cpus).for_each(|n| map[n as usize / 8] |= 1 << (n % 8));
    let mut w = Writer::new();
    w.opaque(if need_map == 0 { &[] } else { &map }).u32(cpus).i32(cpus as i32);
    Ok(w.finish().into())
}

/// `CONNECT_GET_CAPABILITIES`
pub async fn capabilities(call: Call) -> Answered {
    let facts = facts(&call)?;
    let node = call.session.front.engine.inner().node;
    let driver = call.opened()?.driver;
    // What the processor is called is the least of it: without an answer of QEMU's it is left out.
    let cpu = match tokio::try_join!(super::cpu::catalogue(&call), super::cpu::host(&call)) {
        Ok((catalogue, host)) => host.and_then(|h| h.described(&catalogue)),
        Err(e) => {
            tracing::warn!(error = %e.message(), "the capabilities say nothing of the CPU's model");
            None
        }
    };
    // As little as that, of the same answer, which was warned of.
    let pages = super::host::page_sizes(&call).await.unwrap_or_default();
    Ok(text(&xml::capabilities::document(driver, &facts, node.uuid(), cpu, &pages)))
}

/// Demands that `arch` and `kind`, when they are said, are those of this host's machines; answers what the host said of
/// itself, and the kind.
pub fn demand_machines(
    call: &Call,
    arch: Option<&str>,
    kind: Option<&str>,
) -> Result<(HostFacts, String), VirError> {
    let facts = facts(call)?;
    let refuse = xml::machine::refuse;
    if let Some(arch) = arch.filter(|a| *a != facts.architecture) {
        return Err(refuse("os arch", format!("'{arch}' is not the architecture of this host")));
    }
    let kvm = facts.accelerator.kind == AcceleratorKind::Kvm;
    let kind = kind.unwrap_or(if kvm { "kvm" } else { "qemu" });
    if kind != "qemu" && !(kind == "kvm" && kvm) {
        return Err(refuse("domain type", format!("'{kind}' is not usable on this host")));
    }
    let kind = kind.to_owned();
    Ok((facts, kind))
}

/// `CONNECT_GET_DOMAIN_CAPABILITIES`
pub async fn domain_capabilities(call: Call) -> Answered {
    let (_, arch, machine, kind, flags) = call.arguments(|r| {
        let mut next = || r.option(|r| r.string());
        let (emulator, arch, machine, kind) = (next()?, next()?, next()?, next()?);
        Ok((emulator, arch, machine, kind, r.u32()?))
    })?;
    call.known_flags(flags, 0)?;
    if call.opened()?.driver != Driver::Qemu {
        return Err(VirError::no_support("virConnectGetDomainCapabilities"));
    }
    let (facts, kind) = demand_machines(&call, arch.as_deref(), kind.as_deref())?;
    let newest = facts.default_machine.clone().unwrap_or_default();
    if let Some(name) = machine.as_deref().filter(|m| !["pc", "q35"].contains(m) && !m.starts_with("pc-")) {
        let emulator = format!("/usr/bin/qemu-system-{}", facts.architecture);
        return Err(VirError::argument(format!(
            "the machine '{name}' is not supported by emulator '{emulator}'"
        )));
    }
    let machine = karst_engine::compute::slots::versioned(machine.as_deref().or(Some("pc")), &newest);
    let models = super::cpu::catalogue(&call).await?.models;
    Ok(text(&xml::capabilities::domain(&facts, &kind, &machine, MAX_VCPUS, &models)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uris() {
        let of = |uri| parse_uri(uri).map(|o| (o.driver, o.project)).map_err(|e| e.code);
        let default = "default".to_owned();
        assert_eq!(of(None), Ok((Driver::Qemu, default.clone())));
        assert_eq!(of(Some("qemu:///system")), Ok((Driver::Qemu, default.clone())));
        assert_eq!(of(Some("qemu+tls://host:16514/system")), Ok((Driver::Qemu, default.clone())));
        assert_eq!(of(Some("lxc:///")), Ok((Driver::Lxc, default)));
        assert_eq!(of(Some("lxc:///system?project=a%20b")), Ok((Driver::Lxc, "a b".to_owned())));
        for bad in ["qemu:///session", "test:///default", "qemu", "qemu:system", "xen:///system"] {
            assert_eq!(of(Some(bad)), Err(Code::NoConnect), "{bad}");
        }
    }

    #[test]
    fn versions() {
        assert_eq!(version_number("7.2.22 (Debian 1:7.2)"), 7_002_022);
        assert_eq!(version_number("10.0"), 10_000_000);
        assert_eq!(version_number(""), 0);
    }
}
