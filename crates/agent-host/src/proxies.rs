//! Proxies whose end on the host is a unix socket: what the policy must grant, and where a path really leads.
//!
//! A path needs `path_prefixes`, an abstract name `device_classes` with `proxy:@NAME` (or `proxy`): both are servers of the
//! host that a guest would reach, or would seem to be.

use crate::{HostPolicy, nodes::demand};
use karst_host::{mountns::open_beneath, sockets::path_of};
use karst_model::{Error, ErrorKind, Result, device::ProxyAddress, spec::ProxySpec};
use std::{os::fd::AsFd, path::Path};

/// The proxy with paths of the host in which nothing is a link.
///
/// # Errors
/// Forbidden when the policy does not grant it; not found.
pub(crate) fn resolve(policy: &HostPolicy, mut spec: ProxySpec) -> Result<ProxySpec> {
    let in_guest = spec.device.in_guest;
    for (listen, connect) in &mut spec.device.pairs {
        let (end, key) = if in_guest { (connect, "connect") } else { (listen, "listen") };
        let field = || format!("devices.{}.{key}", spec.name);
        match end {
            ProxyAddress::Net(_) => {}
            ProxyAddress::Abstract(name) => {
                demand(policy, "proxy", Some(&format!("@{name}"))).map_err(|e| e.at(field()))?;
            }
            ProxyAddress::Path(path) => {
                let real = real(policy, Path::new(path), in_guest).map_err(|e| e.at(field()))?;
                *path = real;
            }
        }
    }
    Ok(spec)
}

fn real(policy: &HostPolicy, path: &Path, is_there: bool) -> Result<String> {
    if is_there {
        match open_beneath(&policy.path_prefixes, path) {
            // A server may come later.
            Err(e) if e.is(ErrorKind::NotFound) => {}
            found => return text(&path_of(found?.as_fd())?),
        }
    }
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(Error::invalid("listen", format!("{path:?} is no path of a socket")));
    };
    text(&path_of(open_beneath(&policy.path_prefixes, parent)?.as_fd())?.join(name))
}

fn text(path: &Path) -> Result<String> {
    let wrong = || Error::invalid("listen", format!("{path:?} is no UTF-8 path"));
    path.to_str().map(str::to_owned).ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;
    use karst_model::device::{ProxyDevice, ProxyProtocol};

    #[test]
    fn the_hosts_end_is_granted_and_resolved() {
        let dir = tempfile::tempdir().unwrap();
        let granted = dir.path().join("granted");
        std::fs::create_dir_all(granted.join("real")).unwrap();
        std::fs::write(granted.join("real/sock"), "").unwrap();
        std::os::unix::fs::symlink("real", granted.join("way")).unwrap();
        std::os::unix::fs::symlink("/etc", granted.join("out")).unwrap();
        let policy = HostPolicy {
            path_prefixes: vec![granted.clone()],
            device_classes: vec!["proxy:@known".into()],
            ..HostPolicy::default()
        };
        let path = |p: &str| ProxyAddress::Path(granted.join(p).to_str().unwrap().to_owned());
        let inner = || ProxyAddress::Path("/run/inside".into());
        let resolve = |in_guest, host: ProxyAddress| {
            let pairs = vec![if in_guest { (inner(), host) } else { (host, inner()) }];
            let device = ProxyDevice {
                protocol: ProxyProtocol::Tcp,
                in_guest,
                pairs,
                socket: None,
                user: None,
                announce: false,
            };
            let found = resolve(&policy, ProxySpec { name: "p".into(), device })?.device.pairs.remove(0);
            assert_eq!(*(if in_guest { &found.0 } else { &found.1 }), inner(), "the guest's end is its own");
            Ok::<_, Error>(if in_guest { found.1 } else { found.0 })
        };
        for in_guest in [true, false] {
            assert_eq!(resolve(in_guest, path("way/sock")).unwrap(), path("real/sock"));
            assert_eq!(resolve(in_guest, path("way/later")).unwrap(), path("real/later"));
            for bad in
                [path("out/x"), ProxyAddress::Path("/run/x".into()), ProxyAddress::Abstract("x".into())]
            {
                let e = resolve(in_guest, bad).unwrap_err();
                let key = if in_guest { "connect" } else { "listen" };
                assert_eq!(e.field, Some(format!("devices.p.{key}")), "{e}");
                assert!(e.is(ErrorKind::Forbidden), "{e}");
            }
            resolve(in_guest, ProxyAddress::Abstract("known".into())).unwrap();
        }
    }
}
