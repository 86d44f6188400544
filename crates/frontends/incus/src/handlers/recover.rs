//! `/internal/recover`: what `incus admin recover` asks.

use crate::{
    app::{Call, Taken},
    fields::Fields,
    respond::{Reply, empty, sync},
};
use karst_engine::recover::{Lost, RecoverPool};
use karst_model::{Error, Result, access::Permission};
use serde::Serialize;
use serde_json::Value;

/// Most pools of a request.
const MOST: usize = 64;

/// A volume that could be recovered, in Incus' words.
#[derive(Serialize)]
struct Unknown<'a> {
    name: &'a str,
    #[serde(rename = "type")]
    kind: &'static str,
    #[serde(rename = "snapshotCount")]
    snapshots: usize,
    project: &'a str,
    pool: &'a str,
}

/// Incus sends this structure under the names of its fields.
#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Found<'a> {
    unknown_volumes: Vec<Unknown<'a>>,
    dependency_errors: &'a [String],
    /// Karst's own: what is there and cannot be recovered, each with why.
    unclear_volumes: &'a [String],
}

fn unknown(lost: &Lost) -> Unknown<'_> {
    Unknown {
        name: &lost.name,
        kind: lost.kind.map_or("volume", |kind| kind.as_str()),
        snapshots: lost.snapshots,
        project: &lost.project,
        pool: &lost.pool,
    }
}

async fn pools(call: Call) -> Result<(Taken, Vec<RecoverPool>)> {
    call.context.demand_server(Permission::ServerEdit)?;
    let (call, mut f) = call.fields().await?;
    let listed = f.take("pools");
    f.finish(&[])?;
    let Some(Value::Array(listed)) = listed else {
        return Err(Error::invalid("pools", "a list of storage pools is needed"));
    };
    if listed.len() > MOST {
        return Err(Error::invalid("pools", format!("at most {MOST} storage pools are looked at at once")));
    }
    let mut pools: Vec<RecoverPool> = vec![];
    for (n, value) in listed.into_iter().enumerate() {
        let path = format!("pools[{n}]");
        let mut f = Fields::of(value, &path)?;
        let pool = RecoverPool {
            name: f.need_text("name")?,
            driver: f.text("driver")?.unwrap_or_default(),
            description: f.text("description")?.unwrap_or_default(),
            config: f.config("config")?.unwrap_or_default(),
        };
        f.finish(&[])?;
        if pools.iter().any(|p| p.name == pool.name) {
            let text = format!("storage pool {:?} is named twice", pool.name);
            return Err(Error::invalid(format!("{path}.name"), text));
        }
        pools.push(pool);
    }
    Ok((call, pools))
}

/// `POST /internal/recover/validate`
///
/// # Errors
/// Those of the engine.
pub async fn validate(call: Call) -> Result<Reply> {
    let (call, pools) = pools(call).await?;
    let survey = call.engine().recover_validate(&call.context, &pools).await?;
    sync(&Found {
        unknown_volumes: survey.lost.iter().map(unknown).collect(),
        dependency_errors: &survey.missing,
        unclear_volumes: &survey.unclear,
    })
}

/// `POST /internal/recover/import`
///
/// # Errors
/// Those of the engine.
pub async fn import(call: Call) -> Result<Reply> {
    let (call, pools) = pools(call).await?;
    call.engine().recover_import(&call.context, &pools).await?;
    Ok(empty())
}
