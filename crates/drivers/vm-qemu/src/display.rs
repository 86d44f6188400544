//! Screen, keyboard and reset button of a running machine.
//!
//! QEMU's servers of VNC and SPICE listen nowhere: each connection is one end of a socket pair that it is handed, the other
//! goes to who asked, after the API has decided whether he may. So there is no port and no socket file. A display may have a password
//! nevertheless (ADR 56): then each connection brings it along, and it goes to QEMU over its control socket and nowhere else.
//! A viewer of VNC has one connection, one of SPICE has one for each of its channels (ADR 60).

use crate::{launch, machine::Inner, probe, qmp::Qmp};
use karst_model::{
    Error, Result,
    display::{DisplayGuard, DisplayProtocol},
    instance::RuntimeState,
};
use rustix::{
    fs::{MemfdFlags, memfd_create},
    net::{AddressFamily, SocketFlags, SocketType, socketpair},
};
use serde_json::json;
use std::{
    fs::File,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    time::Duration,
};

const GREETING: Duration = Duration::from_secs(5);
/// How long a key is held.
const HELD_MS: u64 = 30;
/// Between two chords: slower than the guest's keyboard is polled.
const BETWEEN: Duration = Duration::from_millis(60);

async fn connect(machine: &Inner) -> Result<Qmp> {
    Ok(Qmp::connect(&machine.dir, launch::QMP, GREETING).await?.0)
}

fn demand_display(machine: &Inner) -> Result<()> {
    let has = machine.record().devices.as_ref().is_some_and(|d| d.display);
    if has { Ok(()) } else { Err(Error::unsupported("this virtual machine was made without a display")) }
}

/// Is the screen there by this protocol, since the machine's start?
fn demand_served(machine: &Inner, protocol: DisplayProtocol) -> Result<()> {
    demand_display(machine)?;
    let (served, wanted) = {
        let record = machine.record();
        (record.spice, record.hardware.as_ref().is_some_and(|h| h.spice))
    };
    match protocol {
        DisplayProtocol::Vnc => Ok(()),
        DisplayProtocol::Spice if served => Ok(()),
        DisplayProtocol::Spice if !wanted => Err(Error::unsupported(
            "the virtual machine was started without SPICE; set hardware.spice=true and start it anew (its screen is there by VNC)",
        )),
        DisplayProtocol::Spice if probe::spice() => Err(Error::conflict(
            "the virtual machine was started before QEMU of its host had SPICE; stop and start it once",
        )),
        DisplayProtocol::Spice => Err(Error::unsupported(
            "QEMU of this host has no SPICE; install the package qemu-system-modules-spice, then stop and start the virtual \
             machine once (its screen is there by VNC)",
        )),
    }
}

fn demand_running(machine: &Inner) -> Result<()> {
    match machine.observed.borrow().state {
        RuntimeState::Paused => Err(Error::conflict("the guest is frozen; resume it first")),
        _ => Ok(()),
    }
}

/// The reset button. What stands still goes on doing so.
pub(crate) async fn reset(machine: &Inner) -> Result<()> {
    let state = machine.observed.borrow().state;
    if !matches!(state, RuntimeState::Running | RuntimeState::Stopping) {
        let mut record = machine.record();
        record.held = true;
        record.write(&machine.dir)?;
    }
    connect(machine).await?.execute("system_reset", json!({})).await.map(drop)
}

/// Presses chords; their names were checked.
pub(crate) async fn press(machine: &Inner, chords: &[Vec<String>]) -> Result<()> {
    demand_running(machine)?;
    let qmp = connect(machine).await?;
    for (n, chord) in chords.iter().enumerate() {
        if n > 0 {
            tokio::time::sleep(BETWEEN).await;
        }
        let keys: Vec<_> = chord.iter().map(|k| json!({"type": "qcode", "data": k})).collect();
        qmp.execute("send-key", json!({"keys": keys, "hold-time": HELD_MS})).await?;
    }
    Ok(())
}

/// A PNG file of the screen, in memory.
pub(crate) async fn screenshot(machine: &Inner) -> Result<OwnedFd> {
    demand_display(machine)?;
    let memory = memfd_create("screenshot", MemfdFlags::CLOEXEC).map_err(std::io::Error::from)?;
    let path = format!("/proc/self/fd/{}", memory.as_raw_fd());
    // QEMU takes a descriptor only for the access that it was opened for.
    let sink = File::options().write(true).open(&path)?;
    let qmp = connect(machine).await?;
    let set = qmp.execute_with_fd("add-fd", json!({"opaque": "screenshot"}), sink.as_fd()).await?;
    let set = set.get("fdset-id").and_then(serde_json::Value::as_u64);
    let set = set.ok_or_else(|| Error::internal("QEMU takes no descriptor", "no fdset-id"))?;
    let dump = json!({"filename": format!("/dev/fdset/{set}"), "format": "png"});
    let dumped = qmp.execute("screendump", dump).await;
    let removed = qmp.execute("remove-fd", json!({"fdset-id": set})).await;
    dumped?;
    removed?;
    Ok(File::open(path)?.into())
}

/// Tells QEMU the password of who is asked for one; without one, nobody who is asked gets in.
pub(crate) async fn guard(machine: &Inner, guard: Option<&DisplayGuard>) -> Result<()> {
    demand_display(machine)?;
    let spice = machine.record().spice;
    let qmp = connect(machine).await?;
    tell(&qmp, DisplayProtocol::Vnc, guard).await?;
    if spice {
        tell(&qmp, DisplayProtocol::Spice, guard).await?;
    }
    Ok(())
}

async fn tell(qmp: &Qmp, protocol: DisplayProtocol, guard: Option<&DisplayGuard>) -> Result<()> {
    let protocol = protocol.as_str();
    let Some(guard) = guard else {
        let now = json!({"protocol": protocol, "time": "now"});
        return qmp.execute("expire_password", now).await.map(drop);
    };
    let password = json!({"protocol": protocol, "password": guard.password.text()});
    if let Err(refusal) = qmp.ask(GREETING, "set_password", password).await? {
        let text =
            "the machine was started before displays here could have a password; stop and start it once";
        return Err(Error::conflict(text).with_context(refusal.description));
    }
    let time = guard.valid_to.map_or("never".to_owned(), |t| t.as_second().max(1).to_string());
    qmp.execute("expire_password", json!({"protocol": protocol, "time": time})).await.map(drop)
}

/// A new connection to the display's server, which asks for the password when there is a guard.
pub(crate) async fn attach(
    machine: &Inner,
    protocol: DisplayProtocol,
    guard: Option<&DisplayGuard>,
) -> Result<OwnedFd> {
    demand_served(machine, protocol)?;
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
        .map_err(std::io::Error::from)?;
    let qmp = connect(machine).await?;
    if guard.is_some() {
        tell(&qmp, protocol, guard).await?;
    }
    qmp.execute_with_fd("getfd", json!({"fdname": "display"}), theirs.as_fd()).await?;
    let client = json!({"protocol": protocol.as_str(), "fdname": "display", "skipauth": guard.is_none()});
    qmp.execute("add_client", client).await?;
    Ok(ours)
}
