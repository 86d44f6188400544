//! Programs by Karst's own agent: streams that flow while they run, terminals, signals.

use super::link::{Link, Stream};
use crate::exec::{Reader, Writer, pipes, terminal};
use async_trait::async_trait;
use karst_guest::{Exec, ExecControl, ExecRequest};
use karst_guest_agent::{
    message::{self, Control as Order, Request, Started},
    wire::{MAX_DATA, channel},
};
use karst_model::{Error, Result};
use std::{collections::BTreeMap, sync::Arc, time::Duration};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    sync::watch,
};

/// How long starting may take.
const START: Duration = Duration::from_secs(20);
/// How long the last output may take until it is in the pipes, after the program's end.
const FLUSH: Duration = Duration::from_secs(10);

struct Control {
    stream: Arc<Stream>,
    outcome: watch::Receiver<Option<Result<i32>>>,
}

impl Drop for Control {
    fn drop(&mut self) {
        // The last output still flows to whoever reads it.
        self.stream.leave();
    }
}

#[async_trait]
impl ExecControl for Control {
    async fn resize(&self, columns: u16, rows: u16) -> Result<()> {
        self.stream.control(Order::Resize((columns, rows)));
        Ok(())
    }
    async fn signal(&self, signal: i32) -> Result<()> {
        if !(1..=64).contains(&signal) {
            return Err(Error::invalid("signal", format!("{signal} is no signal")));
        }
        self.stream.control(Order::Signal(signal));
        Ok(())
    }
    async fn wait(&self) -> Result<i32> {
        let mut outcome = self.outcome.clone();
        let result = outcome.wait_for(Option::is_some).await;
        match result.as_deref() {
            Ok(Some(r)) => r.clone(),
            _ => Err(Error::internal("the program's end was not seen", "its task ended")),
        }
    }
}

/// Starts it; `base` is the environment of the guest's record.
///
/// # Errors
/// Invalid for an empty command or a directory that is none; unavailable when the agent does not answer.
pub(crate) async fn start(
    link: &Arc<Link>,
    base: &BTreeMap<String, String>,
    request: ExecRequest,
) -> Result<Exec> {
    if request.command.is_empty() {
        return Err(Error::invalid("command", "the command is empty"));
    }
    for s in request.command.iter().chain(request.cwd.iter()) {
        if s.contains('\0') {
            return Err(Error::invalid("command", "the command holds a NUL byte"));
        }
    }
    let mut env = base.clone();
    if let (Some(_), Some(term)) = (request.terminal, &request.term) {
        env.insert("TERM".into(), term.clone());
    }
    env.extend(request.environment);
    let program = Request::Exec(message::Exec {
        argv: request.command,
        env: env.into_iter().collect(),
        uid: request.uid,
        gid: request.gid,
        cwd: request.cwd,
        terminal: request.terminal,
    });
    let (streams, stdin, stdout, stderr) = if request.terminal.is_some() { terminal()? } else { pipes()? };
    let stream = link.open(program).await?;
    let started = tokio::time::timeout(START, stream.reply::<Started>()).await;
    started.map_err(|_| Error::timeout("the guest did not start the program in time"))??;

    tokio::spawn(feed(stream.clone(), stdin));
    tokio::spawn(drain(stream.clone(), channel::OUT, stdout));
    tokio::spawn(drain(stream.clone(), channel::ERR, stderr));
    let (sender, outcome) = watch::channel(None);
    let watched = stream.clone();
    tokio::spawn(async move {
        let result = watched.end().await;
        // Whoever learns of the end finds the output in the pipes, unless nobody reads them.
        let _ = tokio::time::timeout(FLUSH, watched.flushed()).await;
        let _ = sender.send(Some(result));
    });
    Ok(Exec { streams, control: Box::new(Control { stream, outcome }) })
}

/// Client to program.
async fn feed(stream: Arc<Stream>, mut source: Reader) {
    let mut buffer = vec![0; MAX_DATA];
    while let Some(room) = stream.credit().await {
        let room = room.min(buffer.len());
        let read = tokio::select! {
            n = source.read(&mut buffer[..room]) => n,
            () = stream.input_over() => return,
        };
        match read {
            Ok(n @ 1..) => stream.send(&buffer[..n]).await,
            // An error is the end too: the client went.
            _ => return stream.end_input().await,
        }
    }
}

/// Program to client.
async fn drain(stream: Arc<Stream>, c: u8, mut sink: Writer) {
    let mut reader_left = false;
    while let Some(bytes) = stream.output(c).await {
        if !reader_left {
            reader_left = sink.write_all(&bytes).await.is_err();
        }
        stream.taken(c, bytes.len());
    }
}
