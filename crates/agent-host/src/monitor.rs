//! QEMU's monitor for people, as far as `host-policy.toml` grants it: commands, and the events of all machines.

use crate::{RealAgent, agent::as_state};
use karst_agent::{MonitorCommand, WithFds};
use karst_guest::MonitorEvent;
use karst_model::{Error, Result, guest::MonitorAnswer, instance::InstanceKind};
use std::os::fd::OwnedFd;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    sync::{Semaphore, broadcast},
};

/// Those who follow the events at once.
static FOLLOWERS: Semaphore = Semaphore::const_new(32);

impl RealAgent {
    pub(crate) async fn monitor(&self, request: MonitorCommand) -> Result<MonitorAnswer> {
        let MonitorCommand { instance, command, arguments } = request;
        let machine = self.machine(instance)?;
        let plain = |b: u8| b.is_ascii_alphanumeric() || b"-_.".contains(&b);
        if command.is_empty() || !command.bytes().all(plain) || !arguments.is_object() {
            return Err(Error::invalid("command", "a command has a name and an object of arguments"));
        }
        self.policy().check_monitor(&command)?;
        machine.monitor(instance, &command, arguments).await.map_err(as_state(instance))
    }

    pub(crate) fn monitor_events(&self) -> Result<WithFds<()>> {
        self.policy().check_monitor_events()?;
        let place = FOLLOWERS
            .try_acquire()
            .map_err(|_| Error::unavailable("too many follow the events of QEMU's monitors"))?;
        let machines = self.driver(InstanceKind::VirtualMachine)?.machine();
        let machines = machines.ok_or_else(|| Error::unsupported("this host has no virtual machines"))?;
        let events = machines.monitor_events();
        let (ours, theirs) = UnixStream::pair()?;
        let theirs = theirs.into_std()?;
        tokio::spawn(async move {
            follow(events, ours).await;
            drop(place);
        });
        Ok(WithFds { value: (), fds: vec![OwnedFd::from(theirs)] })
    }
}

/// Passes events on until nobody reads them.
async fn follow(mut events: broadcast::Receiver<MonitorEvent>, mut to: UnixStream) {
    let mut said = [0; 16];
    loop {
        let event = tokio::select! {
            event = events.recv() => event,
            // Nobody has anything to say here: it is the end.
            _ = to.read(&mut said) => return,
        };
        let event = match event {
            Ok(event) => event,
            Err(broadcast::error::RecvError::Lagged(n)) => {
                tracing::debug!(n, "events of QEMU's monitors were lost: who follows them is slow");
                continue;
            }
            Err(broadcast::error::RecvError::Closed) => return,
        };
        let Ok(mut line) = serde_json::to_vec(&event) else { continue };
        line.push(b'\n');
        if to.write_all(&line).await.is_err() {
            return;
        }
    }
}
