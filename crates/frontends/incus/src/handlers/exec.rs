//! Exec and console: programs and consoles of guests on websockets.
//!
//! Websocket `0` carries stdin, or all of a terminal; `1` and `2` stdout and stderr; `control` resizes and signals as
//! JSON. A text message ends a stream in either direction. Incus' clients connect `control`, `pylxd` does not: only the
//! others are waited for.

use crate::{
    app::{Call, Taken, running},
    respond::{Body, Reply, accepted, empty, full},
    sessions::{self, Awaited},
    socket::{self, Receiver, Sender, Socket},
    stream::{FdStream, Stream},
    wire::{self, operation::OperationView},
};
use futures::{SinkExt, StreamExt};
use hyper::{
    Response,
    header::{CONTENT_DISPOSITION, CONTENT_TYPE, HeaderValue},
};
use karst_engine::{
    LiveOperation, NewOperation,
    compute::{guest::ExecSession, outputs::OutputStream},
};
use karst_model::{Error, OperationId, Result, guest::ExecRequest, operation::OperationClass};
use serde_json::{Map, Value, json};
use std::{os::fd::OwnedFd, time::Duration};
use tokio::{
    io::AsyncReadExt,
    sync::{oneshot, watch},
    task::JoinHandle,
};
use tokio_tungstenite::tungstenite::Message;

/// How long output is waited for after the program ended, when others still hold its pipes (background processes).
const LINGER: Duration = Duration::from_millis(100);
/// How long a client may take for the last output of a program that has ended. It may be read in a pager; but one that was
/// stopped takes nothing, and would hold the operation and the session for ever.
const LAST: Duration = Duration::from_secs(3600);
/// How long the output of a program that has ended is waited for where it is kept: others of its processes may hold on to it.
const KEPT: Duration = Duration::from_secs(5);
/// How long its host may take to write the last of it: a busy disk is not a reason to lose it.
const WRITTEN: Duration = Duration::from_secs(30);
/// A terminal without a size.
const SIZE: (u16, u16) = (80, 25);

fn size(width: Option<i64>, height: Option<i64>) -> (u16, u16) {
    let one =
        |n: Option<i64>, default| n.and_then(|n| u16::try_from(n).ok()).filter(|n| *n > 0).unwrap_or(default);
    (one(width, SIZE.0), one(height, SIZE.1))
}

fn id(f: &mut crate::fields::Fields, name: &'static str) -> Result<u32> {
    let n = f.integer(name)?.unwrap_or(0);
    u32::try_from(n).map_err(|_| Error::invalid(name, format!("{n} is not an id")))
}

/// `POST /1.0/instances/{name}/exec`
///
/// # Errors
/// Those of the engine; invalid by field.
pub async fn exec(call: Call) -> Result<Reply> {
    let (call, mut f) = call.fields().await?;
    let interactive = f.flag("interactive")?;
    let environment = f.config("environment")?.unwrap_or_default();
    let (width, height) = (f.integer("width")?, f.integer("height")?);
    let request = ExecRequest {
        command: f.texts("command")?.unwrap_or_default(),
        term: environment.get("TERM").cloned().filter(|_| interactive),
        environment,
        uid: id(&mut f, "user")?,
        gid: id(&mut f, "group")?,
        cwd: f.text("cwd")?.filter(|c| !c.is_empty()),
        terminal: interactive.then(|| size(width, height)),
    };
    let sockets = f.flag("wait-for-websocket")?;
    // On websockets the client has the output itself.
    let record = f.flag("record-output")? && !sockets;
    if record && interactive {
        return Err(Error::invalid(
            "record-output",
            "what is kept has no terminal; leave out interactive, or use websockets",
        ));
    }
    f.finish(&[])?;
    let project = call.project().to_owned();
    let view = call.engine().exec_check(&call.context, &project, call.param(0), &request)?;
    call.engine().exec_expected(&view);
    let mut metadata = Map::new();
    metadata.insert("command".into(), json!(request.command));
    metadata.insert("interactive".into(), json!(interactive));
    let new = NewOperation {
        description: "Executing command".into(),
        class: if sockets { OperationClass::Websocket } else { OperationClass::Task },
        project: Some(view.project.id),
        resources: [(
            "instances".into(),
            vec![wire::path("instances", &view.instance.name, &view.project.name)],
        )]
        .into(),
        may_cancel: false,
        metadata,
    };
    let live = call.engine().inner().operations.begin(&call.context, new);
    if !sockets {
        let answer = running(&live)?;
        let path = super::logs::path_of_outputs(&view);
        tokio::spawn(async move {
            if !record {
                let result = unattended(&call, &project, request).await;
                return end(&call, &live, result, Map::new());
            }
            let result = recorded(&call, &project, request, live.id()).await;
            let output = [("1", OutputStream::Stdout), ("2", OutputStream::Stderr)]
                .map(|(number, stream)| (number.to_owned(), json!(path(&stream.of(live.id())))));
            end(
                &call,
                &live,
                result,
                Map::from_iter([("output".to_owned(), Value::Object(output.into_iter().collect()))]),
            );
        });
        return Ok(answer);
    }
    let names: &[&'static str] = if interactive { &["control", "0"] } else { &["control", "0", "1", "2"] };
    let (answer, awaited) = offer(&call, &live, names)?;
    tokio::spawn(async move {
        let result = attended(&call, &project, request, awaited).await;
        close(&call, &live, result.as_ref().err());
        end(&call, &live, result, Map::new());
    });
    Ok(answer)
}

/// What was offered is awaited no more. A client that still connects its sockets is told why, for as long as it could have.
pub(super) fn close(call: &Taken, live: &LiveOperation, failed: Option<&Error>) {
    let (app, id) = (call.app.clone(), live.id());
    let Some(why) = failed else { return app.sessions.withdraw(id) };
    app.sessions.fail(id, why);
    tokio::spawn(async move {
        tokio::time::sleep(sessions::PATIENCE).await;
        app.sessions.withdraw(id);
    });
}

/// 202 with the secrets of the offered websockets.
fn offer(call: &Taken, live: &LiveOperation, names: &[&'static str]) -> Result<(Reply, Awaited)> {
    let (secrets, awaited) = call.app.sessions.offer(live.id(), names);
    Ok((offered(live, secrets)?, awaited))
}

/// 202 with these secrets.
pub(super) fn offered(live: &LiveOperation, secrets: Map<String, Value>) -> Result<Reply> {
    let record = live.snapshot();
    let mut metadata = record.metadata.clone();
    metadata.insert("fds".into(), Value::Object(secrets));
    accepted(&record.id.to_string(), &OperationView::of(&record).with_metadata(&metadata))
}

/// Ends the operation of a program. By the two codes that say "there is no such program" and "it cannot be executed" it
/// fails, as Incus' does: its client has no other way to tell why.
fn end(call: &Taken, live: &LiveOperation, result: Result<i32>, more: Map<String, Value>) {
    let operations = &call.engine().inner().operations;
    let outcome = |code: i32| {
        let mut all = more.clone();
        all.insert("return".to_owned(), json!(code));
        all
    };
    match result {
        Ok(code @ 127) => operations.end_failed(live, Error::not_found("Command not found"), outcome(code)),
        Ok(code @ 126) => {
            operations.end_failed(live, Error::conflict("Command not executable"), outcome(code));
        }
        result => operations.end(live, result.map(outcome)),
    }
}

/// Runs a program nobody listens to.
async fn unattended(call: &Taken, project: &str, request: ExecRequest) -> Result<i32> {
    let ExecSession { fds, session } =
        call.engine().exec(&call.context, project, call.param(0), request).await?;
    let mut fds = fds.into_iter();
    drop(fds.next());
    for fd in fds {
        let mut stream = Stream::new(fd)?;
        tokio::spawn(async move { tokio::io::copy(&mut stream, &mut tokio::io::sink()).await });
    }
    session.wait().await
}

/// Runs a program nobody listens to, and has the host keep what it prints.
async fn recorded(call: &Taken, project: &str, request: ExecRequest, operation: OperationId) -> Result<i32> {
    let (engine, context, name) = (call.engine(), &call.context, call.param(0));
    let mut kept = vec![];
    for stream in OutputStream::ALL {
        kept.push(engine.exec_output_keep(context, project, name, operation, stream).await?);
    }
    let started = engine.exec(context, project, name, request).await;
    let ExecSession { fds, session } = match started {
        Ok(started) => started,
        Err(e) => {
            for stream in OutputStream::ALL {
                // Nothing was printed into it; what cannot be deleted now goes with the oldest.
                let _ = engine.exec_output_delete(context, project, name, &stream.of(operation)).await;
            }
            return Err(e);
        }
    };
    let (mut copies, mut ends) = (vec![], vec![]);
    // Standard input has nothing in it.
    for (source, kept) in fds.into_iter().skip(1).zip(kept) {
        let mut source = Stream::new(source)?;
        let sinks = kept.fds.into_iter().map(Stream::new).collect::<std::io::Result<Vec<_>>>()?;
        copies.push(tokio::spawn(async move {
            for mut sink in sinks {
                // One that broke off has nothing more to give.
                let _ = tokio::io::copy(&mut source, &mut sink).await;
            }
        }));
        ends.push(kept.session);
    }
    let code = session.wait().await;
    // Others of its processes may hold on to its pipes: what is there is taken.
    taken(copies, KEPT).await;
    for end in ends {
        let whole = tokio::time::timeout(WRITTEN, end.wait()).await;
        if !matches!(whole, Ok(Ok(0))) {
            tracing::debug!(%operation, "the output of a program is not kept whole");
        }
    }
    code
}

/// Runs a program on websockets.
async fn attended(call: &Taken, project: &str, request: ExecRequest, mut awaited: Awaited) -> Result<i32> {
    let control = awaited.remove(0);
    let rest = awaited.split_off(1);
    // The program starts while the client still connects what is left.
    let first = sessions::all(awaited).await?;
    let (session, rest) = tokio::try_join!(
        call.engine().exec(&call.context, project, call.param(0), request),
        sessions::all(rest)
    )?;
    let sockets: Vec<Socket> = first.into_iter().chain(rest).collect();
    bridge(session, sockets, control).await
}

/// Joins a session's descriptors to websockets until it ends.
async fn bridge(exec: ExecSession, sockets: Vec<Socket>, control: oneshot::Receiver<Socket>) -> Result<i32> {
    let ExecSession { fds, session } = exec;
    let (ended, has_ended) = watch::channel(false);
    let (mut outputs, mut listeners) = (vec![], vec![]);
    let mut input = None;
    for (socket, fd) in sockets.into_iter().zip(sources(fds)?) {
        let (sender, mut receiver) = socket.split();
        if let Some(sink) = fd.sink {
            input = Some(tokio::spawn(async move { socket::pump_in(&mut receiver, sink).await }));
        } else {
            let listening = async move { while receiver.next().await.is_some_and(|m| m.is_ok()) {} };
            listeners.push(tokio::spawn(listening));
        }
        match fd.source {
            Some(source) => outputs.push(tokio::spawn(drain(source, sender, has_ended.clone()))),
            // The client's end of stdin needs nothing of us but to stay open.
            None => outputs.push(tokio::spawn(hold(sender, has_ended.clone()))),
        }
    }
    let (commands, mut ordered) = tokio::sync::mpsc::channel(16);
    let controller = tokio::spawn(control_loop(control, commands));
    let result = {
        let wait = session.wait();
        tokio::pin!(wait);
        let mut heard = true;
        loop {
            let order = tokio::select! {
                code = &mut wait => break code,
                order = ordered.recv(), if heard => order,
            };
            match order {
                Some(Order::Resize(columns, rows)) => log("resize", session.resize(columns, rows).await),
                Some(Order::Signal(signal)) => log("signal", session.signal(signal).await),
                Some(Order::Leave) => break Err(Error::cancelled("the client went away")),
                None => heard = false,
            }
        }
    };
    ended.send_replace(true);
    // A program that goes on is ended first, so that its output ends; of one that has ended the output is taken first.
    let over = result.is_ok().then_some(session);
    let taken = taken(outputs, LAST).await;
    drop(over);
    if let Some(input) = input {
        input.abort();
    }
    controller.abort();
    if !taken {
        // The other halves of its sockets, which nobody closes any more.
        listeners.iter().for_each(|listener| listener.abort());
        return result.and_then(|_| Err(Error::timeout("the client did not take the program's last output")));
    }
    result
}

/// Waits until the client has taken what is left of the output; what it has not in this time is given up.
async fn taken(mut outputs: Vec<JoinHandle<()>>, patience: Duration) -> bool {
    let all = async {
        for output in &mut outputs {
            // One that broke off has nothing left to give.
            let _ = output.await;
        }
    };
    let taken = tokio::time::timeout(patience, all).await.is_ok();
    outputs.iter().for_each(|output| output.abort());
    taken
}

fn log(what: &str, result: Result<()>) {
    if let Err(e) = result {
        tracing::debug!(what, error = %e, "an order to a session was not followed");
    }
}

/// What a websocket is joined to.
struct Ends {
    source: Option<Stream>,
    sink: Option<Stream>,
}

fn sources(fds: Vec<OwnedFd>) -> Result<Vec<Ends>> {
    if fds.len() == 1 {
        let both = fds.into_iter().map(FdStream::new).next().transpose()?;
        return Ok(both
            .map(|s| Ends { source: Some(Stream::Polled(s.clone())), sink: Some(Stream::Polled(s)) })
            .into_iter()
            .collect());
    }
    fds.into_iter()
        .enumerate()
        .map(|(n, fd)| {
            let stream = Some(Stream::new(fd)?);
            Ok(if n == 0 { Ends { source: None, sink: stream } } else { Ends { source: stream, sink: None } })
        })
        .collect()
}

/// Sends what a program writes, to its end; after the program's end only as long as there is more at once.
async fn drain(mut source: Stream, mut sender: Sender, mut ended: watch::Receiver<bool>) {
    let mut buffer = vec![0; 64 << 10];
    loop {
        let over = *ended.borrow();
        let read = if over {
            match tokio::time::timeout(LINGER, source.read(&mut buffer)).await {
                Ok(read) => read,
                Err(_) => break,
            }
        } else {
            tokio::select! {
                read = source.read(&mut buffer) => read,
                _ = ended.changed() => continue,
            }
        };
        match read {
            Ok(n) if n > 0 => {
                if sender.send(Message::binary(buffer[..n].to_vec())).await.is_err() {
                    return;
                }
            }
            _ => break,
        }
    }
    let _ = sender.send(Message::text("")).await;
    socket::close(sender).await;
}

async fn hold(sender: Sender, mut ended: watch::Receiver<bool>) {
    let _ = ended.wait_for(|e| *e).await;
    socket::close(sender).await;
}

/// What the client orders on the control websocket.
enum Order {
    Resize(u16, u16),
    Signal(i32),
    Leave,
}

async fn control_loop(control: oneshot::Receiver<Socket>, orders: tokio::sync::mpsc::Sender<Order>) {
    let Ok(socket) = control.await else { return };
    let (_sender, mut receiver): (Sender, Receiver) = socket.split();
    loop {
        let order = match receiver.next().await {
            Some(Ok(Message::Text(text))) => match parse_order(&text) {
                Some(order) => order,
                None => continue,
            },
            Some(Ok(Message::Binary(data))) => match std::str::from_utf8(&data).ok().and_then(parse_order) {
                Some(order) => order,
                None => continue,
            },
            Some(Ok(Message::Ping(_) | Message::Pong(_) | Message::Frame(_))) => continue,
            Some(Ok(Message::Close(_)) | Err(_)) | None => Order::Leave,
        };
        let last = matches!(order, Order::Leave);
        if orders.send(order).await.is_err() || last {
            return;
        }
    }
}

fn parse_order(text: &str) -> Option<Order> {
    let value: Value = serde_json::from_str(text).ok()?;
    match value.get("command")?.as_str()? {
        "window-resize" => {
            let side = |name| match &value["args"][name] {
                Value::String(s) => s.parse::<u16>().ok(),
                other => other.as_u64().and_then(|n| u16::try_from(n).ok()),
            };
            Some(Order::Resize(side("width")?, side("height")?))
        }
        "signal" => {
            let signal = i32::try_from(value.get("signal")?.as_i64()?).ok()?;
            (1..=64).contains(&signal).then_some(Order::Signal(signal))
        }
        _ => None,
    }
}

/// `POST /1.0/instances/{name}/console`: the serial console; with the type `vga` the screen ([`super::spice`]); with `port` the
/// port of a virtual machine that this device is (Karst's own).
///
/// # Errors
/// Those of the engine.
pub async fn console(call: Call) -> Result<Reply> {
    let (call, mut f) = call.fields().await?;
    let (width, height) = (f.integer("width")?, f.integer("height")?);
    match f.text("type")?.as_deref() {
        None | Some("" | "console") => {}
        Some("vga") => return super::spice::open(call, f).await,
        Some(other) => {
            let text = format!("{other:?} is not a console; use \"console\" or \"vga\"");
            return Err(Error::invalid("type", text));
        }
    }
    let force = f.flag("force")?;
    let port = f.text("port")?.filter(|p| !p.is_empty());
    f.finish(&[])?;
    let project = call.project().to_owned();
    if let Some(port) = port {
        let session =
            call.engine().machine_port(&call.context, &project, call.param(0), &port, force).await?;
        return show(call, session, (None, None)).await;
    }
    let session = call.engine().console(&call.context, &project, call.param(0), force).await?;
    show(call, session, (width, height)).await
}

/// `POST /1.0/karst/instances/{name}/reset`: the reset button of a virtual machine.
///
/// # Errors
/// Those of the engine.
pub async fn reset(call: Call) -> Result<Reply> {
    let (call, f) = call.fields().await?;
    f.finish(&[])?;
    call.engine().machine_reset(&call.context, call.project(), call.param(0)).await?;
    Ok(empty())
}

/// `POST /1.0/karst/instances/{name}/keys`: presses keys of a virtual machine: `{"keys": ["ctrl-alt-delete", "a"]}`.
///
/// # Errors
/// Those of the engine.
pub async fn keys(call: Call) -> Result<Reply> {
    let (call, mut f) = call.fields().await?;
    let keys = f.texts("keys")?.unwrap_or_default();
    f.finish(&[])?;
    call.engine().machine_keys(&call.context, call.project(), call.param(0), &keys).await?;
    Ok(empty())
}

/// `GET /1.0/karst/instances/{name}/screenshot`: what a virtual machine shows, as PNG.
///
/// # Errors
/// Those of the engine.
pub async fn screenshot(call: Call) -> Result<Reply> {
    let fd = call.engine().machine_screenshot(&call.context, call.project(), call.param(0)).await?;
    let picture = tokio::task::spawn_blocking(move || {
        let mut picture = vec![];
        // A screen of QEMU's VGA has 16 MiB.
        std::io::Read::read_to_end(
            &mut std::io::Read::take(std::fs::File::from(fd), 32 << 20),
            &mut picture,
        )?;
        Ok::<_, std::io::Error>(picture)
    });
    let picture = picture.await.map_err(|e| Error::internal("the screenshot could not be read", e))??;
    let mut reply = bytes(picture);
    reply.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("image/png"));
    reply
        .headers_mut()
        .insert(CONTENT_DISPOSITION, HeaderValue::from_static("inline;filename=screenshot.png"));
    Ok(reply)
}

/// Begins the operation in which a console or a screen is shown.
pub(super) fn begin(call: &Taken) -> Result<LiveOperation> {
    let view = call.engine().instance(&call.context, call.project(), call.param(0))?;
    let new = NewOperation {
        description: "Showing console".into(),
        class: OperationClass::Websocket,
        project: Some(view.project.id),
        resources: [(
            "instances".into(),
            vec![wire::path("instances", &view.instance.name, &view.project.name)],
        )]
        .into(),
        may_cancel: true,
        metadata: Map::new(),
    };
    Ok(call.engine().inner().operations.begin(&call.context, new))
}

/// Offers a session's stream on a websocket.
pub(super) async fn show(
    call: Taken,
    session: ExecSession,
    (width, height): (Option<i64>, Option<i64>),
) -> Result<Reply> {
    let live = begin(&call)?;
    let (answer, awaited) = offer(&call, &live, &["control", "0"])?;
    if width.is_some_and(|w| w > 0) {
        let (columns, rows) = size(width, height);
        log("resize", session.session.resize(columns, rows).await);
    }
    tokio::spawn(async move {
        let result = tokio::select! {
            result = attach(session, awaited) => result,
            () = live.cancelled() => Err(Error::cancelled("the console was detached")),
        };
        close(&call, &live, result.as_ref().err());
        call.engine().inner().operations.end(&live, result.map(|()| Map::new()));
    });
    Ok(answer)
}

/// Joins a console to a websocket until either goes away.
async fn attach(exec: ExecSession, mut awaited: Awaited) -> Result<()> {
    let control = awaited.remove(0);
    let mut sockets = sessions::all(awaited).await?;
    let ExecSession { fds, session } = exec;
    let fd = fds
        .into_iter()
        .next()
        .ok_or_else(|| Error::internal("the console has no stream", "no descriptor"))?;
    let stream = FdStream::new(fd)?;
    let Some(socket) = sockets.pop() else {
        return Ok(());
    };
    let (mut sender, mut receiver) = socket.split();
    let (commands, mut ordered) = tokio::sync::mpsc::channel(16);
    let controller = tokio::spawn(control_loop(control, commands));
    let orders = async {
        while let Some(order) = ordered.recv().await {
            match order {
                Order::Resize(columns, rows) => log("resize", session.resize(columns, rows).await),
                Order::Signal(_) => {}
                Order::Leave => return,
            }
        }
        std::future::pending().await
    };
    tokio::select! {
        _ = socket::pump_out(stream.clone(), &mut sender) => {}
        _ = socket::pump_in(&mut receiver, stream.clone()) => {}
        () = orders => {}
    }
    controller.abort();
    socket::close(sender).await;
    Ok(())
}

fn bytes(data: Vec<u8>) -> Reply {
    let body: Body = full(data);
    let mut reply = Response::new(body);
    reply.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    reply.headers_mut().insert(CONTENT_DISPOSITION, HeaderValue::from_static("inline;filename=console.log"));
    reply
}

/// `GET /1.0/instances/{name}/console`: the kept log.
///
/// # Errors
/// Those of the engine.
pub async fn console_log(call: Call) -> Result<Reply> {
    match call.query.get("type") {
        None | Some("log") => {}
        Some("vga") => return screenshot(call).await,
        Some(other) => {
            return Err(Error::invalid("type", format!("{other:?} is neither \"log\" nor \"vga\"")));
        }
    }
    Ok(bytes(call.engine().console_log(&call.context, call.project(), call.param(0), false).await?))
}

/// `DELETE /1.0/instances/{name}/console`: empties the log.
///
/// # Errors
/// Those of the engine.
pub async fn console_clear(call: Call) -> Result<Reply> {
    call.engine().console_log(&call.context, call.project(), call.param(0), true).await?;
    Ok(empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_a_client_never_takes_is_given_up() {
        let long = Duration::from_secs(60);
        assert!(taken(vec![tokio::spawn(async {})], long).await);
        let (held, given_up) = oneshot::channel::<()>();
        let stopped = tokio::spawn(async move {
            let _held = held;
            std::future::pending::<()>().await;
        });
        let outputs = vec![tokio::spawn(async {}), stopped];
        assert!(!taken(outputs, Duration::from_millis(50)).await);
        let nobody = tokio::time::timeout(long, given_up).await.expect("it is left behind");
        assert!(nobody.is_err());
    }

    #[test]
    fn orders_as_clients_send_them() {
        let resize = r#"{"command":"window-resize","args":{"height":"40","width":"120"},"signal":0}"#;
        assert!(matches!(parse_order(resize), Some(Order::Resize(120, 40))));
        assert!(matches!(
            parse_order(r#"{"command":"signal","args":null,"signal":15}"#),
            Some(Order::Signal(15))
        ));
        for bad in [
            "",
            "{}",
            r#"{"command":"signal","signal":99}"#,
            r#"{"command":"window-resize","args":{"width":"x","height":"1"}}"#,
        ] {
            assert!(parse_order(bad).is_none(), "{bad}");
        }
    }
}
