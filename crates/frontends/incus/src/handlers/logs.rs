//! Logs of instances: what the program said that runs one (`lxc.log`, `qemu.log`), and what programs printed that ran in one
//! while nobody listened.

use crate::{
    app::Call,
    respond::{Reply, empty, sync},
    stream::Stream,
    wire,
};
use hyper::{
    Response,
    header::{CONTENT_TYPE, HeaderValue},
};
use karst_engine::InstanceView;
use karst_model::{Error, Result, instance::InstanceKind};
use std::sync::Arc;
use tokio::io::AsyncReadExt;

/// The one log that an instance has.
fn name_of(kind: InstanceKind) -> &'static str {
    match kind {
        InstanceKind::Container => "lxc.log",
        InstanceKind::VirtualMachine => "qemu.log",
    }
}

/// The log that the path names must be the one that there is.
fn demand(call: &Call) -> Result<Arc<InstanceView>> {
    let view = call.engine().instance(&call.context, call.project(), call.param(0))?;
    let (there, asked) = (name_of(view.instance.kind), call.param(1));
    if asked == there {
        return Ok(view);
    }
    let text = format!("log {asked:?} not found; instance {:?} has {there}", &*view.instance.name);
    Err(Error::not_found(text))
}

/// `GET /1.0/instances/{name}/logs`
///
/// # Errors
/// Those of the engine.
pub async fn list(call: Call) -> Result<Reply> {
    let view = call.engine().instance(&call.context, call.project(), call.param(0))?;
    let log = call.engine().instance_log(&call.context, call.project(), call.param(0), false).await?;
    let path = below(&view, "logs");
    let all = match log.is_empty() && view.reason.is_none() {
        true => vec![],
        false => vec![path(name_of(view.instance.kind))],
    };
    sync(&all)
}

/// Paths of what lies below an instance.
fn below(view: &InstanceView, what: &'static str) -> impl Fn(&str) -> String + use<> {
    let path = wire::path("instances", &view.instance.name, &view.project.name);
    let (path, query) = match path.split_once('?') {
        Some((path, query)) => (path.to_owned(), format!("?{query}")),
        None => (path, String::new()),
    };
    move |name| format!("{path}/{what}/{name}{query}")
}

/// Paths of what the programs of an instance printed, by name.
pub(super) fn path_of_outputs(view: &InstanceView) -> impl Fn(&str) -> String + use<> {
    below(view, "logs/exec-output")
}

/// `GET /1.0/instances/{name}/logs/exec-output`
///
/// # Errors
/// Those of the engine.
pub async fn outputs(call: Call) -> Result<Reply> {
    let view = call.engine().instance(&call.context, call.project(), call.param(0))?;
    let all = call.engine().exec_outputs(&call.context, call.project(), call.param(0)).await?;
    let path = path_of_outputs(&view);
    sync(&all.iter().map(|name| path(name)).collect::<Vec<_>>())
}

/// `GET /1.0/instances/{name}/logs/exec-output/{filename}`
///
/// # Errors
/// Those of the engine.
pub async fn output(call: Call) -> Result<Reply> {
    let opened =
        call.engine().exec_output(&call.context, call.project(), call.param(0), call.param(1)).await?;
    let mut bytes = vec![];
    Stream::new(opened)?.read_to_end(&mut bytes).await?;
    let mut reply: Reply = Response::new(crate::respond::full(bytes));
    reply.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    Ok(reply)
}

/// `DELETE /1.0/instances/{name}/logs/exec-output/{filename}`
///
/// # Errors
/// Those of the engine.
pub async fn output_delete(call: Call) -> Result<Reply> {
    call.engine().exec_output_delete(&call.context, call.project(), call.param(0), call.param(1)).await?;
    Ok(empty())
}

/// `GET /1.0/instances/{name}/logs/{filename}`
///
/// # Errors
/// Those of the engine.
pub async fn get(call: Call) -> Result<Reply> {
    let view = demand(&call)?;
    let mut log = call.engine().instance_log(&call.context, call.project(), call.param(0), false).await?;
    // Clients of Incus show the log, and have no place for why it is as it is.
    if let Some(reason) = &view.reason {
        if !log.is_empty() && !log.ends_with(b"\n") {
            log.push(b'\n');
        }
        log.extend_from_slice(format!("{reason}\n").as_bytes());
    }
    let mut reply: Reply = Response::new(crate::respond::full(log));
    reply.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    Ok(reply)
}

/// `DELETE /1.0/instances/{name}/logs/{filename}`: empties it.
///
/// # Errors
/// Those of the engine.
pub async fn delete(call: Call) -> Result<Reply> {
    demand(&call)?;
    call.engine().instance_log(&call.context, call.project(), call.param(0), true).await?;
    Ok(empty())
}
