//! `POST /1.0/instances/{name}/console` with the type `vga`: the screen of a virtual machine, by SPICE on websockets.
//!
//! A viewer of SPICE has a connection for each of its channels, and opens more as it goes. Incus' client takes them at a socket
//! of its own and connects a websocket for each, all under the secret of `0`, until it closes `control`; then all of them end.

use super::exec::{begin, close, offered};
use crate::{
    app::Taken,
    fields::Fields,
    respond::Reply,
    sessions::PATIENCE,
    socket::{self, Socket},
    stream::FdStream,
};
use futures::StreamExt;
use karst_engine::compute::guest::ExecSession;
use karst_model::{Error, Result, display::DisplayProtocol};
use serde_json::Map;
use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};
use tokio::{
    sync::{mpsc, oneshot},
    task::JoinSet,
    time::{Instant, sleep_until},
};

/// Channels at a time, of all viewers under one secret; one viewer has about ten.
const CHANNELS: usize = 64;

/// Answers the operation of a screen; its metadata names the secrets (`{"fds": {"0", "control"}}`).
///
/// # Errors
/// Those of the engine, before there is an operation.
pub(super) async fn open(call: Taken, mut f: Fields) -> Result<Reply> {
    // Taken, as Incus takes it: whoever begins to look takes the screen over in any case, because SPICE's server has one viewer.
    f.flag("force")?;
    f.finish(&[])?;
    // The first channel already now: who connects a websocket could not be told what is wrong.
    let first = attach(&call).await?;
    let live = begin(&call)?;
    let (secrets, control, sockets) = call.app.sessions.offer_many(live.id());
    let answer = offered(&live, secrets)?;
    let call = Arc::new(call);
    tokio::spawn(async move {
        let result = tokio::select! {
            result = serve(&call, first, control, sockets) => result,
            () = live.cancelled() => Err(Error::cancelled("the screen was detached")),
        };
        close(&call, &live, result.as_ref().err());
        call.engine().inner().operations.end(&live, result.map(|()| Map::new()));
    });
    Ok(answer)
}

async fn attach(call: &Taken) -> Result<ExecSession> {
    let (project, name) = (call.project(), call.param(0));
    call.engine().machine_display(&call.context, project, name, DisplayProtocol::Spice, false).await
}

/// Joins channels to the screen until the client lets go of `control`. One that never took hold of it is given some time to
/// connect a channel, and after its last one.
async fn serve(
    call: &Arc<Taken>,
    first: ExecSession,
    control: oneshot::Receiver<Socket>,
    mut sockets: mpsc::Receiver<Socket>,
) -> Result<()> {
    let mut first = Some(first);
    let mut channels = JoinSet::new();
    let held = AtomicBool::new(false);
    let released = async {
        let Ok(mut socket) = control.await else { return std::future::pending().await };
        held.store(true, Ordering::Relaxed);
        // Nothing is said there but its end.
        while let Some(Ok(_)) = socket.next().await {}
    };
    tokio::pin!(released);
    let (mut end, mut seen) = (Instant::now() + PATIENCE, false);
    loop {
        let alone = channels.is_empty() && !held.load(Ordering::Relaxed);
        tokio::select! {
            () = &mut released => return Ok(()),
            socket = sockets.recv() => {
                let Some(socket) = socket else { return Ok(()) };
                seen = true;
                if channels.len() < CHANNELS {
                    channels.spawn(join(call.clone(), first.take(), socket));
                }
            }
            Some(_) = channels.join_next() => end = Instant::now() + PATIENCE,
            () = sleep_until(end), if alone || first.is_some() => {
                // It does not wait in QEMU for a viewer that may come hours later.
                first = None;
                if channels.is_empty() && !held.load(Ordering::Relaxed) {
                    let late = "the client did not connect the websockets it was offered";
                    return if seen { Ok(()) } else { Err(Error::timeout(late)) };
                }
            }
        }
    }
}

/// Joins one channel to the screen until either goes away.
async fn join(call: Arc<Taken>, session: Option<ExecSession>, socket: Socket) {
    let (mut sender, mut receiver) = socket.split();
    let joined = async {
        let ExecSession { fds, session } = match session {
            Some(session) => session,
            None => attach(&call).await?,
        };
        let fd = fds.into_iter().next();
        let fd = fd.ok_or_else(|| Error::internal("the screen has no stream", "no descriptor"))?;
        let stream = FdStream::new(fd)?;
        tokio::select! {
            _ = socket::pump_out(stream.clone(), &mut sender) => {}
            _ = socket::pump_in(&mut receiver, stream.clone()) => {}
        }
        drop(session);
        Ok::<_, Error>(())
    };
    if let Err(e) = joined.await {
        // Its socket closes, which is all that a viewer can be told.
        tracing::debug!(error = %e, "a channel of a viewer got no screen");
    }
    socket::close(sender).await;
}
