//! `/1.0/karst/audit`: who did what, and whether the record of it is whole.

use crate::{
    app::Call,
    respond::{Reply, sync},
};
use karst_model::{Error, Result};
use serde_json::{Value, json};

/// Records of an answer when it is not said how many.
const LIMIT: u32 = 500;

/// `GET /1.0/karst/audit?from=N&limit=M`: records from number N on, at most M (1000).
///
/// # Errors
/// Those of the engine; invalid by parameter.
pub async fn list(call: Call) -> Result<Reply> {
    let number = |name: &'static str, default: u64| match call.query.integer(name)? {
        None => Ok(default),
        Some(n) => u64::try_from(n).map_err(|_| Error::invalid(name, "a number of at least 0")),
    };
    let from = number("from", 1)?;
    let limit = u32::try_from(number("limit", u64::from(LIMIT))?).unwrap_or(LIMIT);
    sync(&call.engine().audit_read(&call.context, from, limit).await?)
}

/// `GET /1.0/karst/audit/verify`: for each host `{"node", "first", "checked", "head": {"seq", "hash"}, "fault"}`.
///
/// # Errors
/// Those of the engine.
pub async fn verify(call: Call) -> Result<Reply> {
    let verdicts = call.engine().audit_verify(&call.context).await?;
    let view = |(node, v): &(String, karst_model::audit::AuditVerdict)| {
        json!({
            "node": node, "first": v.first, "checked": v.checked, "fault": v.fault,
            "head": {"seq": v.head.seq, "hash": v.head.hash},
        })
    };
    sync(&verdicts.iter().map(view).collect::<Vec<Value>>())
}
