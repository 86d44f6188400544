//! `GET /1.0/events`: lifecycle and operation events on a websocket.

use crate::{
    app::Call,
    respond::Reply,
    socket::{self, LISTENER, PING, Socket},
    wire::{
        NOWHERE,
        operation::{EventView, LifecycleView, OperationView, Requestor},
    },
};
use futures::{SinkExt, StreamExt};
use karst_engine::{
    Engine,
    events::{Event, EventKind, Subscription},
};
use karst_model::{Error, ProjectId, Result, access::Permission, error::nearest};
use serde::Serialize;
use tokio::sync::broadcast::error::RecvError;
use tokio_tungstenite::tungstenite::Message;

const TYPES: &[&str] = &["lifecycle", "operation", "logging", "network-acl", "ovn"];

/// What a listener wants.
struct Wanted {
    lifecycle: bool,
    operation: bool,
    logging: bool,
    project: Option<ProjectId>,
}

/// `GET /1.0/events`
///
/// # Errors
/// Invalid type, forbidden.
pub async fn listen(call: Call) -> Result<Reply> {
    let mut wanted = Wanted { lifecycle: true, operation: true, logging: true, project: None };
    if let Some(types) = call.query.get("type") {
        for t in types.split(',') {
            if !TYPES.contains(&t) {
                let hint = nearest(t, TYPES.iter().copied()).unwrap_or("lifecycle");
                return Err(Error::invalid(
                    "type",
                    format!("{t:?} is not a type of event; did you mean {hint:?}?"),
                ));
            }
        }
        let has = |name| types.split(',').any(|t| t == name);
        (wanted.lifecycle, wanted.operation, wanted.logging) =
            (has("lifecycle"), has("operation"), has("logging"));
    }
    if !call.query.flag("all-projects") {
        wanted.project =
            Some(call.engine().project(&call.context, call.project(), Permission::ProjectView)?.id);
    }
    let events = call.engine().subscribe(&call.context)?;
    let engine = call.engine().clone();
    engine.change_expected();
    socket::websocket(call.request, LISTENER, move |socket| serve(engine, socket, events, wanted))
}

async fn serve(engine: Engine, socket: Socket, mut events: Subscription, wanted: Wanted) {
    let (mut sender, mut receiver) = socket.split();
    let mut pings = tokio::time::interval(PING);
    loop {
        let message = tokio::select! {
            event = events.recv() => match event {
                Ok(event) => match render(&event, &wanted) {
                    Some(text) => Message::text(text),
                    None => continue,
                },
                Err(RecvError::Lagged(n)) => match lost(n, engine.inner().env.now(), &wanted) {
                    Some(text) => Message::text(text),
                    None => continue,
                },
                Err(RecvError::Closed) => break,
            },
            _ = pings.tick() => Message::Ping("keepalive".into()),
            incoming = receiver.next() => match incoming {
                None | Some(Err(_) | Ok(Message::Close(_))) => break,
                Some(Ok(_)) => continue,
            },
        };
        // A listener that does not take anything for long is dropped rather than waited for.
        match tokio::time::timeout(3 * PING, sender.send(message)).await {
            Ok(Ok(())) => {}
            _ => return,
        }
    }
    socket::close(sender).await;
}

fn render(event: &Event, wanted: &Wanted) -> Option<String> {
    if wanted.project.is_some() && event.project.is_some() && event.project != wanted.project {
        return None;
    }
    match &event.kind {
        EventKind::Operation(operation) if wanted.operation => {
            json("operation", event, OperationView::of(operation))
        }
        EventKind::Lifecycle { action, source, context, requestor } if wanted.lifecycle => {
            let name = source
                .strip_prefix("/1.0/instances/")
                .map_or("", |rest| rest.split(['/', '?']).next().unwrap_or_default());
            let (protocol, username) = match requestor.split_once(' ') {
                Some(("unix", "user 0")) => ("unix", "root"),
                Some(("unix", user)) => ("unix", user.trim_start_matches("user ")),
                Some(("certificate", who)) => ("tls", who.split(' ').next().unwrap_or(who)),
                Some(("token", name)) => ("token", name),
                _ => ("unix", requestor.as_str()),
            };
            let view = LifecycleView {
                action,
                source,
                context,
                requestor: Requestor { username, protocol, address: "@" },
                name,
                project: if name.is_empty() { "" } else { &event.project_name },
            };
            json("lifecycle", event, view)
        }
        EventKind::Log { level, message, context } if wanted.logging => json(
            "logging",
            event,
            serde_json::json!({"message": message, "level": level, "context": context}),
        ),
        _ => None,
    }
}

fn json(kind: &'static str, event: &Event, metadata: impl Serialize) -> Option<String> {
    let view =
        EventView { kind, timestamp: event.time, metadata, location: NOWHERE, project: &event.project_name };
    serde_json::to_string(&view).ok()
}

/// Tells a listener that was too slow.
fn lost(n: u64, now: jiff::Timestamp, wanted: &Wanted) -> Option<String> {
    wanted.logging.then(|| {
        serde_json::json!({
            "type": "logging",
            "timestamp": now,
            "metadata": {
                "message": "this listener was too slow and events were lost",
                "level": "warning",
                "context": {"lost": n.to_string()},
            },
            "location": NOWHERE,
        })
        .to_string()
    })
}
