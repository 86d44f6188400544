//! The screen of a machine, to viewers that ask for a descriptor (`virt-viewer --attach`, virt-manager) or bring one.
//!
//! There is no port: a viewer's connection is a socket pair, of which this relays the other end to the machine's display.

use super::{Answered, Named, domain::is_running, nothing};
use crate::{
    error::{Code, Part, VirError},
    session::{Answer, Call},
};
use karst_engine::{InstanceView, compute::guest::ExecSession, stream::FdStream};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use std::{io, os::fd::OwnedFd};
use tokio::sync::{Semaphore, SemaphorePermit};

/// Viewers at once; each is a connection of QEMU's and a task here.
static VIEWERS: Semaphore = Semaphore::const_new(256);
/// `VIR_DOMAIN_OPEN_GRAPHICS_SKIPAUTH`: as it is here always, because the connection to libvirt was let in.
const SKIP_AUTH: u32 = 1;

/// A viewer that may come.
struct Viewer {
    display: ExecSession,
    place: SemaphorePermit<'static>,
}

async fn admit(call: &Call, view: &InstanceView, index: u32) -> Result<Viewer, VirError> {
    if !is_running(view) {
        return Err(VirError::state("domain is not running"));
    }
    if index != 0 {
        return Err(VirError::state(format!("No graphics backend with index {index}")));
    }
    let place = VIEWERS.try_acquire().map_err(|_| VirError::state("too many viewers are connected"))?;
    let session = &call.session;
    let (engine, context) = (&session.front.engine, &session.context);
    let display = engine.machine_display(context, &view.project.name, &view.instance.name).await?;
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
    let viewer = admit(&call, &view, index).await?;
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
    let viewer = admit(&call, &view, index).await?;
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
        .map_err(io::Error::from)
        .map_err(karst_model::Error::from)?;
    let client = FdStream::new(ours).map_err(karst_model::Error::from)?;
    Ok(Answer { fds: vec![theirs], then: Some(Box::pin(relay(viewer, client))), ..nothing() })
}

fn arguments(call: &Call) -> Result<(Named, u32, u32), VirError> {
    call.arguments(|r| Ok((Named::read_domain(r)?, r.u32()?, r.u32()?)))
}
