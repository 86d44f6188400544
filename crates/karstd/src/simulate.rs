//! `--simulate`: everything in one process without privileges, over simulated hosts.

use crate::{control, directory::Directory, privilege};
use karst_agent::{HostAgent, SimulatedAgent, SimulatedOptions};
use karst_model::{Result, screens::ScreenGrants};
use std::{path::Path, sync::Arc};

/// How much to simulate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    /// Hosts, 1 to 10,000.
    pub hosts: u32,
    /// Guests for each, at most 1,000.
    pub guests: u32,
}

impl Size {
    /// `3x50`.
    pub fn parse(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is not HOSTSxGUESTS, such as 3x50 (at most 10000x1000)");
        let (hosts, guests) = text.split_once('x').ok_or_else(wrong)?;
        let (hosts, guests) = (hosts.parse().map_err(|_| wrong())?, guests.parse().map_err(|_| wrong())?);
        if !(1..=10_000).contains(&hosts) || guests > 1000 {
            return Err(wrong());
        }
        Ok(Self { hosts, guests })
    }
}

/// Runs it until a signal ends it.
///
/// # Errors
/// When DIR cannot be used.
pub fn run(dir: &Path, size: Size) -> Result<()> {
    privilege::small_heap();
    let directory = Directory::open(dir, None)?;
    let [socket, full, read_only] = [
        directory.socket("unix.socket", 0o660, None)?,
        directory.socket("libvirt-sock", 0o660, None)?,
        directory.socket("libvirt-sock-ro", 0o660, None)?,
    ];
    tracing::info!(dir = %directory.path.display(), hosts = size.hosts, guests = size.guests, "simulating");
    let outcome = control::block_on(|env, shutdown| {
        let host = |n| {
            let options = SimulatedOptions {
                name: format!("host{n}"),
                daemon_id: Some(directory.daemon_id.clone()),
                // The ports would be this machine's.
                screens: ScreenGrants::default(),
                ..SimulatedOptions::default()
            };
            let agent: Arc<dyn HostAgent> = SimulatedAgent::new(env.clone(), options);
            (format!("host{n}"), agent)
        };
        Ok(control::run(control::ControlContext {
            dir: directory.path.clone(),
            api_listener: control::listener(socket)?,
            libvirt: control::LibvirtListeners {
                full: control::listener(full)?,
                read_only: control::listener(read_only)?,
            },
            agents: (1..=size.hosts).map(host).collect(),
            daemon_id: directory.daemon_id.clone(),
            env: env.clone(),
            simulated_guests: Some(size.guests),
            shutdown,
        }))
    });
    for name in ["unix.socket", "libvirt-sock", "libvirt-sock-ro"] {
        directory.remove_socket(name);
    }
    outcome.map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(Size::parse("3x50"), Ok(Size { hosts: 3, guests: 50 }));
        for wrong in ["", "3", "x", "0x1", "3x-1", "99999x1", "1x1001", "a x b"] {
            assert!(Size::parse(wrong).is_err(), "{wrong}");
        }
    }
}
