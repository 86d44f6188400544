//! The console as a stream.

use super::{Answered, Named};
use crate::{
    error::VirError,
    frame::{Frame, Header, Status},
    session::{Answer, Call, Input, Session, StreamInput},
    xml::machine::ports,
};
use bytes::Bytes;
use karst_engine::{
    compute::{expand::parse_devices, guest::ExecSession},
    stream::FdStream,
};
use std::{os::fd::OwnedFd, sync::Arc};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// Bytes of a frame of the console.
const CHUNK: usize = 64 << 10;
/// `VIR_DOMAIN_CONSOLE_FORCE`: whoever is attached is detached.
const FORCE: u32 = 1;
/// `VIR_DOMAIN_CONSOLE_SAFE`: only where two cannot write at once, which is always so here.
const SAFE: u32 = 2;

/// `DOMAIN_OPEN_CONSOLE`
pub async fn open(call: Call) -> Answered {
    let (named, device, flags) =
        call.arguments(|r| Ok((Named::read_domain(r)?, r.option(|r| r.string())?, r.u32()?)))?;
    call.known_flags(flags, FORCE | SAFE)?;
    let view = call.guest(&named)?;
    if !super::domain::is_running(&view) {
        return Err(VirError::state("domain is not running"));
    }
    let session = &call.session;
    let (engine, context) = (&session.front.engine, &session.context);
    let force = flags & FORCE != 0;
    // What it was started with may differ from what it will start with.
    let applied = view.runtime.as_ref().and_then(|r| r.applied.as_ref());
    let all = parse_devices(applied.map_or(&view.expanded_devices, |a| &a.devices))?.ports;
    let port = ports::named(&all, device.as_deref()).map_err(VirError::argument)?;
    let (project, name) = (&view.project.name, &view.instance.name);
    let mut console = match port {
        Some(port) => engine.machine_port(context, project, name, &port, force).await?,
        None => engine.console(context, project, name, force).await?,
    };
    let fd = console.fds.pop().ok_or_else(|| VirError::state("the console cannot be attached to"))?;
    let input = session.stream(call.header)?;
    let then = pump(session.clone(), call.header, console, fd, input);
    Ok(Answer { payload: vec![], fds: vec![], then: Some(Box::pin(then)) })
}

/// Both ways, until either side ends.
async fn pump(session: Arc<Session>, header: Header, console: ExecSession, fd: OwnedFd, mut input: Input) {
    let outcome = relay(&session, header, fd, &mut input).await;
    // One that was ended from the other side has been told.
    let told = !session.stream_ended(header);
    match outcome {
        _ if told => {}
        Ok(()) => session.send(Frame::new(header.stream(Status::Ok), Bytes::new())).await,
        Err(e) => {
            let error = VirError::from(karst_model::Error::from(e));
            session.send(Frame::new(header.stream(Status::Error), error.encode())).await;
        }
    }
    drop(console);
}

async fn relay(session: &Session, header: Header, fd: OwnedFd, input: &mut Input) -> std::io::Result<()> {
    let mut reader = FdStream::new(fd)?;
    let mut writer = reader.clone();
    let out = async {
        let mut buffer = vec![0; CHUNK];
        loop {
            match reader.read(&mut buffer).await? {
                0 => return Ok(()),
                n => {
                    let data = Bytes::copy_from_slice(&buffer[..n]);
                    session.send(Frame::new(header.stream(Status::Continue), data)).await;
                }
            }
        }
    };
    let into = async {
        while let Some(StreamInput::Data(data)) = input.recv().await {
            writer.write_all(&data).await?;
        }
        Ok(())
    };
    // Apart: a guest that takes no input until somebody reads what it says must not stop both.
    tokio::select! {
        ended = out => ended,
        ended = into => ended,
        () = session.ended() => Ok(()),
    }
}
