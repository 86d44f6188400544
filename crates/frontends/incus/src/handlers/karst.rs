//! `/1.0/karst`: what Incus lacks.

use crate::{
    app::Call,
    respond::{Reply, sync},
};
use karst_model::{Error, Result, access::Permission};
use serde::Serialize;
use serde_json::json;

/// `GET /1.0/karst/host`: the nodes, as their agents last described them.
///
/// # Errors
/// Forbidden.
pub async fn host(call: Call) -> Result<Reply> {
    call.context.demand_server(Permission::ServerInspect)?;
    let inner = call.engine().inner();
    let nodes: Vec<_> = inner
        .inventory
        .read()
        .nodes
        .values()
        .map(|n| json!({"name": &*n.name, "id": n.id, "this": n.id == inner.node, "facts": n.facts}))
        .collect();
    sync(
        &json!({"version": call.app.info.version, "epoch": inner.epoch, "daemon_id": inner.daemon_id, "nodes": nodes}),
    )
}

/// `GET /1.0/karst/check`: what disagrees between the records and the hosts: `{"leaks": […], "sagas": […]}`, in words.
///
/// # Errors
/// Forbidden; unavailable when a host does not answer.
pub async fn check(call: Call) -> Result<Reply> {
    sync(&call.engine().health(&call.context).await?)
}

/// `GET /1.0/karst/status`: this daemon, and whether its host answers now:
/// `{"daemon", "pid", "hosts", "instances", "host": facts or {"error"}}`.
///
/// # Errors
/// Forbidden.
pub async fn status(call: Call) -> Result<Reply> {
    call.context.demand_server(Permission::ServerInspect)?;
    let engine = call.engine();
    let host = match engine.probe_host(&call.context).await {
        Ok(facts) => serde_json::to_value(facts)?,
        Err(e) => json!({"error": e.message}),
    };
    let inner = engine.inner();
    sync(&json!({
        "daemon": inner.daemon_id,
        "pid": std::process::id(),
        "hosts": inner.agents.nodes().len(),
        "instances": engine.instances_all(&call.context).len(),
        "host": host,
    }))
}

/// `GET /1.0/karst/instances/{name}`: what an instance is known by besides its name:
/// `{"name", "project", "id", "vmid", "vmid_chosen", "last_end", "reason"}`. `vmid_chosen` tells whether a client chose the number,
/// `last_end` how the guest ended last (`shutdown`, `forced`, `crashed`; `null` where it runs or that is not known), and `reason`,
/// in words, why it is halted or how it ended by itself.
///
/// # Errors
/// Not found, forbidden.
pub async fn instance(call: Call) -> Result<Reply> {
    let view = call.engine().instance(&call.context, call.project(), call.param(0))?;
    let instance = &view.instance;
    sync(&json!({
        "name": &*instance.name,
        "project": &*view.project.name,
        "id": instance.id,
        "vmid": instance.vmid,
        "vmid_chosen": instance.vmid_chosen,
        "last_end": karst_engine::events::reason(view.runtime.as_ref().and_then(|r| r.exit.as_ref()), false),
        "reason": view.reason,
    }))
}

/// `GET /1.0/karst/instances/{name}/pending`: what of a running instance waits for its next start:
/// `[{"key", "live", "configured"}]`, where `null` is a value that is not there.
///
/// # Errors
/// Not found, forbidden.
pub async fn pending(call: Call) -> Result<Reply> {
    sync(&call.engine().instance_pending(&call.context, call.project(), call.param(0))?)
}

/// `GET /1.0/karst/instances/{name}/history`: what an instance used: averages of minutes over an hour, of ten minutes over a day,
/// of hours over a month: `{"series": [{"seconds", "kept", "points": [{"time", "measured_ms", "cpu", "memory", "disk_read",
/// "disk_written", "received", "sent"}]}]}`. `cpu` is in thousandths of a CPU, `memory` in bytes, the rest in bytes a second;
/// what is not known is absent. `seconds` of the query chooses one series.
///
/// # Errors
/// Not found, forbidden; invalid for a resolution that there is not.
pub async fn history(call: Call) -> Result<Reply> {
    let chosen = call.query.integer("seconds")?;
    let mut all = call.engine().instance_history(&call.context, call.project(), call.param(0)).await?;
    if let Some(seconds) = chosen {
        let there: Vec<String> = all.iter().map(|s| s.seconds.to_string()).collect();
        all.retain(|s| i64::from(s.seconds) == seconds);
        if all.is_empty() {
            let text = format!("there are no averages of {seconds} s; there are {}", there.join(", "));
            return Err(Error::invalid("seconds", text));
        }
    }
    sync(&json!({ "series": all }))
}

/// What an instance has used so far.
#[derive(Serialize)]
struct Used<'a> {
    name: &'a str,
    project: &'a str,
    #[serde(rename = "type")]
    kind: &'static str,
    status: &'static str,
    /// Milliseconds since 1970.
    sampled_at: Option<i64>,
    cpu_ns: Option<u64>,
    memory: Option<u64>,
    memory_total: Option<u64>,
    disk_read: Option<u64>,
    disk_written: Option<u64>,
    received: Option<u64>,
    sent: Option<u64>,
    processes: Option<u64>,
}

/// `GET /1.0/karst/top`: what the running instances of a project have used so far, or with `all-projects` those of all that the
/// caller may see, at most 2 s old: two answers make a rate. Bytes, nanoseconds, and when it was so (milliseconds since 1970).
///
/// # Errors
/// Those of the engine.
pub async fn top(call: Call) -> Result<Reply> {
    let views = super::instances::views(&call)?;
    let sample = call.engine().all_metrics().await;
    let running = views.iter().filter_map(|v| Some((v, sample.get(&v.instance.id)?)));
    let all = running.map(|(view, m)| {
        let traffic = |n: usize| {
            let mut counters =
                m.interfaces.values().filter(|i| !i.loopback).map(|i| i.counters[n]).peekable();
            counters.peek().is_some().then(|| counters.sum())
        };
        Used {
            name: &view.instance.name,
            project: &view.project.name,
            kind: view.instance.kind.as_str(),
            status: crate::wire::instance::status(view.status).0,
            sampled_at: m.sampled_at,
            cpu_ns: m.cpu_ns,
            memory: m.memory,
            memory_total: m.memory_total,
            disk_read: m.disk_read,
            disk_written: m.disk_written,
            received: traffic(0),
            sent: traffic(1),
            processes: m.processes,
        }
    });
    sync(&all.collect::<Vec<_>>())
}

/// `GET /1.0/karst/openapi`: the API as an OpenAPI document, as it is in `docs/openapi.json`.
///
/// # Errors
/// Internal, when it cannot be encoded.
pub async fn openapi(_: Call) -> Result<Reply> {
    sync(&crate::openapi::document())
}
