//! The screen of a machine, to viewers that ask for a descriptor (`virt-viewer --attach`, virt-manager) or bring one.
//!
//! A viewer's connection is a socket pair, of which this relays the other end to the machine's display; ports are the engine's
//! (ADR 70). And the password of a screen (ADR 56).

use super::{
    Answered, Named,
    connect::facts,
    devices::{CONFIG, LIVE, live},
    domain::is_running,
    nothing,
};
use crate::{
    error::{Code, Part, VirError},
    session::{Answer, Call, Driver},
    xml::{
        Element, domain,
        machine::{Machine, Screen, read, refuse, screens},
        read::document,
    },
};
use karst_engine::{InstanceView, compute::guest::ExecSession, stream::FdStream};
use karst_model::{Config, display::DisplayProtocol};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use std::{io, os::fd::OwnedFd};
use tokio::sync::{Semaphore, SemaphorePermit};

/// Connections of viewers at once, of which one that speaks SPICE has about ten; each is one of QEMU's and a task here.
static VIEWERS: Semaphore = Semaphore::const_new(256);
/// `VIR_DOMAIN_OPEN_GRAPHICS_SKIPAUTH`: the viewer is not asked for the password, because the connection to libvirt was let in.
/// Who may not change the domain is asked nevertheless.
const SKIP_AUTH: u32 = 1;

/// A viewer that may come.
struct Viewer {
    display: ExecSession,
    place: SemaphorePermit<'static>,
}

/// The keys that a running domain was started with.
fn configuration(view: &InstanceView) -> &Config {
    let applied = view.runtime.as_ref().and_then(|r| r.applied.as_ref());
    applied.map_or(&view.expanded_config, |a| &a.config)
}

async fn admit(call: &Call, view: &InstanceView, index: u32, flags: u32) -> Result<Viewer, VirError> {
    if !is_running(view) {
        return Err(VirError::state("domain is not running"));
    }
    let spice = domain::speaks_spice(configuration(view), Some(&facts(call)?));
    let Some(protocol) = screens(spice).get(index as usize).copied() else {
        return Err(VirError::state(format!("No graphics backend with index {index}")));
    };
    let place = VIEWERS.try_acquire().map_err(|_| VirError::state("too many viewers are connected"))?;
    let session = &call.session;
    let (engine, context) = (&session.front.engine, &session.context);
    let (project, name, unasked) = (&view.project.name, &view.instance.name, flags & SKIP_AUTH != 0);
    let display = engine.machine_display(context, project, name, protocol, unasked).await?;
    Ok(Viewer { display, place })
}

/// Both ways until either side ends. The connection to libvirt may end before, as viewers expect.
async fn relay(viewer: Viewer, client: FdStream) {
    let Viewer { mut display, place } = viewer;
    if let Some(screen) = display.fds.pop().and_then(|fd| FdStream::new(fd).ok()) {
        let (mut from_client, mut to_client) = (client.clone(), client);
        let (mut from_screen, mut to_screen) = (screen.clone(), screen);
        // However it ends, both ends are closed then; there is nobody to tell why.
        tokio::select! {
            _ = tokio::io::copy(&mut from_client, &mut to_screen) => {}
            _ = tokio::io::copy(&mut from_screen, &mut to_client) => {}
        }
    }
    drop(place);
}

fn unusable(e: io::Error) -> VirError {
    VirError::argument(format!("the descriptor is no socket to relay to: {e}"))
}

/// `DOMAIN_OPEN_GRAPHICS`: the viewer's socket comes with the call.
pub async fn open(mut call: Call) -> Answered {
    let (named, index, flags) = arguments(&call)?;
    call.known_flags(flags, SKIP_AUTH)?;
    let view = call.guest(&named)?;
    let fd: OwnedFd = match (call.fds.pop(), call.fds.is_empty()) {
        (Some(fd), true) => fd,
        _ => return Err(VirError::argument("one descriptor has to come with the call")),
    };
    rustix::net::sockopt::socket_type(&fd).map_err(|e| unusable(e.into()))?;
    let client = FdStream::new(fd).map_err(unusable)?;
    let viewer = admit(&call, &view, index, flags).await?;
    Ok(Answer { then: Some(Box::pin(relay(viewer, client))), ..nothing() })
}

/// `DOMAIN_OPEN_GRAPHICS_FD`: the viewer gets its end.
pub async fn open_fd(call: Call) -> Answered {
    if !call.session.passes_descriptors {
        let text = "a screen is given as a descriptor, which goes over the unix socket of this server only";
        return Err(VirError::new(Code::OperationUnsupported, Part::Rpc, text));
    }
    let (named, index, flags) = arguments(&call)?;
    call.known_flags(flags, SKIP_AUTH)?;
    let view = call.guest(&named)?;
    let viewer = admit(&call, &view, index, flags).await?;
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
        .map_err(io::Error::from)
        .map_err(karst_model::Error::from)?;
    let client = FdStream::new(ours).map_err(karst_model::Error::from)?;
    Ok(Answer { fds: vec![theirs], then: Some(Box::pin(relay(viewer, client))), ..nothing() })
}

fn arguments(call: &Call) -> Result<(Named, u32, u32), VirError> {
    call.arguments(|r| Ok((Named::read_domain(r)?, r.u32()?, r.u32()?)))
}

/// Nothing but the password of a screen changes: what else the document says of it has to be as it is shown, or unsaid.
fn demand_same(call: &Call, view: &InstanceView, bare: &Element) -> Result<(), VirError> {
    let mut all = vec![];
    for inactive in [false, true] {
        let domain = document(&domain::document(call, view, inactive)?)?;
        for graphics in domain.find("devices").into_iter().flat_map(|d| d.all("graphics")) {
            all.push(read::screen(graphics)?.0);
        }
    }
    // Which machines have, whatever their definition says of it; every one has VNC.
    let spice = all.iter().any(|e| read::protocol(e) == Some(DisplayProtocol::Spice));
    let Some(protocol) = read::protocol(bare).filter(|p| screens(spice).contains(p)) else {
        let text = "machines have a screen of type vnc, and one of type spice where hardware.spice is set";
        return Err(refuse("graphics type", text));
    };
    let own = Element::new("graphics").with("type", protocol.as_str());
    all.push(own.child(Element::new("listen").with("type", "none")));
    let anywhere = [("port", "-1"), ("autoport", "yes")];
    let same = |shown: &Element| {
        let known = |(n, v): (&str, &str)| shown.attribute(n) == Some(v) || anywhere.contains(&(n, v));
        bare.attributes().all(known) && bare.elements().iter().all(|e| shown.elements().contains(e))
    };
    match all.iter().any(same) {
        true => Ok(()),
        false => Err(refuse("graphics", "of a screen the password changes: passwd and passwdValidTo")),
    }
}

/// Makes the password of a domain's screen what a document says.
pub(super) async fn set(call: &Call, project: &str, name: &str, said: Screen) -> Result<(), VirError> {
    let session = &call.session;
    let (engine, context) = (&session.front.engine, &session.context);
    let there = engine.display_state(context, project, name)?.password;
    let guard = match said {
        Screen::Open if there => None,
        Screen::Unsaid | Screen::Open => return Ok(()),
        Screen::Guarded(guard) => Some(guard),
    };
    Ok(engine.display_password_set(context, project, name, guard).await?)
}

/// Demands what [`set`] needs, before anything else of a document is done.
pub(super) fn demand_settable(call: &Call, said: &Screen) -> Result<(), VirError> {
    let session = &call.session;
    match said {
        Screen::Guarded(_) => {
            let project = &session.opened()?.project;
            Ok(session.front.engine.display_passwords_kept(&session.context, project)?)
        }
        Screen::Unsaid | Screen::Open => Ok(()),
    }
}

/// Demands that the host lets the screens of a document listen where it says. What says of no place listens where it may.
pub(super) fn demand_places(call: &Call, machine: &Machine) -> Result<(), VirError> {
    let facts = facts(call)?;
    // Who has not said anything yet is told of by the engine.
    if facts.default_machine.is_none() {
        return Ok(());
    }
    let grants = facts.screens;
    for (_, listen) in machine.places.screens.listeners().filter(|(_, l)| !l.is_free()) {
        grants.demand(listen.at()).map_err(|e| refuse("graphics listen", e.message))?;
        if machine.screen == Screen::Open {
            grants.demand_open(listen.at()).map_err(|e| refuse("graphics passwd", e.message))?;
        }
    }
    Ok(())
}

/// `DOMAIN_UPDATE_DEVICE_FLAGS` of a screen. A domain has one password, which counts at once.
pub async fn update(call: &Call, named: &Named, e: &Element, flags: u32) -> Answered {
    // The third is force, which changes nothing here.
    call.known_flags(flags, LIVE | CONFIG | 4)?;
    let view = call.guest(named)?;
    if call.opened()?.driver != Driver::Qemu {
        return Err(refuse("graphics", "containers have no screen"));
    }
    live(&view, flags)?;
    let (bare, said) = read::screen(e)?;
    demand_same(call, &view, &bare)?;
    set(call, &view.project.name, &view.instance.name, said).await?;
    Ok(nothing())
}
