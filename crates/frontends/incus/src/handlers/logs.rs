//! Logs of instances: what the program said that runs one (`lxc.log`, `qemu.log`).

use crate::{
    app::Call,
    respond::{Reply, empty, sync},
    wire,
};
use hyper::{
    Response,
    header::{CONTENT_TYPE, HeaderValue},
};
use karst_model::{Error, Result, instance::InstanceKind};

/// The one log that an instance has.
fn name_of(kind: InstanceKind) -> &'static str {
    match kind {
        InstanceKind::Container => "lxc.log",
        InstanceKind::VirtualMachine => "qemu.log",
    }
}

/// The log that the path names must be the one that there is.
fn demand(call: &Call) -> Result<()> {
    let view = call.engine().instance(&call.context, call.project(), call.param(0))?;
    let (there, asked) = (name_of(view.instance.kind), call.param(1));
    if asked == there {
        return Ok(());
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
    let path = wire::path("instances", &view.instance.name, &view.project.name);
    let (path, query) =
        path.split_once('?').map_or((path.as_str(), String::new()), |(p, q)| (p, format!("?{q}")));
    let all = match log.is_empty() {
        true => vec![],
        false => vec![format!("{path}/logs/{}{query}", name_of(view.instance.kind))],
    };
    sync(&all)
}

/// `GET /1.0/instances/{name}/logs/{filename}`
///
/// # Errors
/// Those of the engine.
pub async fn get(call: Call) -> Result<Reply> {
    demand(&call)?;
    let log = call.engine().instance_log(&call.context, call.project(), call.param(0), false).await?;
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
