//! `/`, `/1.0`, resources, warnings, metadata, and what `incus admin` asks for.

use crate::{
    app::Call,
    extensions::EXTENSIONS,
    respond::{Etag, Reply, empty, sync, sync_etag},
};
use karst_engine::tenancy::server::SERVER_KEYS;
use karst_model::{
    Config, Error, Result,
    access::{Identity, Permission},
    keys::{INSTANCE_KEYS, KeyScope},
    network::BRIDGE_KEYS,
    node::{HostFacts, StorageDriver},
    storage::PoolKind,
};
use serde_json::{Map, Value, json};

/// Release of Incus whose contract this is.
const CONTRACT: &str = "6.0.4";

fn facts(call: &Call) -> HostFacts {
    let inner = call.engine().inner();
    let records = inner.inventory.read();
    let mut facts = records.nodes.get(&inner.node).and_then(|n| n.facts.clone()).unwrap_or_default();
    if facts.storage.is_empty() {
        // It has not said yet what it can have; directories are everywhere.
        facts.storage.push(StorageDriver { kind: PoolKind::Dir, version: "1".into(), missing: None });
    }
    facts
}

/// Drivers of the pools that there are, and their versions, as Incus joins them.
fn storage(call: &Call, facts: &HostFacts) -> (String, String) {
    let records = call.engine().inner().inventory.read();
    let used = |kind: PoolKind| records.pools.values().any(|pool| pool.kind == kind);
    let used: Vec<_> = facts.storage.iter().filter(|d| used(d.kind)).collect();
    let join = |of: fn(&StorageDriver) -> &str| used.iter().map(|d| of(d)).collect::<Vec<_>>().join(" | ");
    (join(|d| d.kind.as_str()), join(|d| d.version.as_str()))
}

/// `GET /`
///
/// # Errors
/// None.
pub async fn root(_: Call) -> Result<Reply> {
    sync(&["/1.0"])
}

/// `GET /1.0`
///
/// # Errors
/// Forbidden.
pub async fn get(call: Call) -> Result<Reply> {
    let trusted = call.context.demand_server(Permission::ServerView).is_ok();
    // Who may not inspect the server sees no configuration.
    let config = call.engine().server_config(&call.context).unwrap_or_default();
    let mut answer = json!({
        "config": config.config,
        "api_extensions": &EXTENSIONS[..],
        "api_status": "stable",
        "api_version": "1.0",
        "auth": if trusted { "trusted" } else { "untrusted" },
        "public": false,
        "auth_methods": ["tls"],
    });
    if !trusted {
        return sync(&answer);
    }
    // Every command of the clients begins like this.
    call.engine().change_expected();
    let (method, user) = match &call.context.principal().identity {
        Identity::UnixPeer { uid: 0, .. } => ("unix", "root".to_owned()),
        Identity::UnixPeer { uid, .. } => ("unix", uid.to_string()),
        Identity::Certificate { fingerprint, .. } => ("tls", fingerprint.clone()),
        Identity::Token { name, .. } => ("token", name.clone()),
        Identity::System | Identity::Anonymous => ("", String::new()),
    };
    let facts = facts(&call);
    let drivers: Vec<(&str, String)> = [("lxc", &facts.lxc), ("qemu", &facts.qemu)]
        .into_iter()
        .filter_map(|(name, version)| Some((name, version.clone()?)))
        .collect();
    let join = |f: fn(&(&str, String)) -> String| drivers.iter().map(f).collect::<Vec<_>>().join(" | ");
    let storage = storage(&call, &facts);
    let architectures = match facts.architecture.as_str() {
        "x86_64" => vec!["x86_64", "i686"],
        other => vec![other],
    };
    let map = answer.as_object_mut().ok_or_else(|| Error::internal("the answer is no object", "json"))?;
    map.insert("auth_user_name".into(), user.into());
    map.insert("auth_user_method".into(), method.into());
    map.insert(
        "environment".into(),
        json!({
            "addresses": call.app.remote.addresses(),
            "architectures": architectures,
            "certificate": call.app.info.identity.as_ref().map_or("", |i| i.certificate.as_str()),
            "certificate_fingerprint": call.app.info.identity.as_ref().map_or("", |i| i.fingerprint.as_str()),
            "driver": join(|d| d.0.to_owned()),
            "driver_version": join(|d| d.1.clone()),
            "firewall": "nftables",
            "kernel": "Linux",
            "kernel_architecture": facts.architecture,
            "kernel_features": {},
            "kernel_version": facts.kernel,
            "lxc_features": {},
            "os_name": facts.os_name,
            "os_version": facts.os_version,
            "project": call.project(),
            "server": "karst",
            "server_clustered": false,
            "server_event_mode": "full-mesh",
            "server_name": call.app.info.name,
            "server_pid": std::process::id(),
            "server_version": CONTRACT,
            "karst_version": call.app.info.version,
            "storage": storage.0,
            "storage_version": storage.1,
            "storage_supported_drivers": facts
                .storage_kinds()
                .map(|d| json!({"Name": d.kind.as_str(), "Version": d.version, "Remote": false}))
                .collect::<Vec<_>>(),
        }),
    );
    sync_etag(&answer, &etag(&call, config.spec_version))
}

const VIEW: &str = "server";

fn etag(call: &Call, version: u64) -> Etag {
    Etag::of(VIEW, call.engine().inner().node.uuid(), version)
}

/// `PUT` and `PATCH /1.0`: the server's configuration. Where it is to listen is tried before anything is recorded.
///
/// # Errors
/// Those of the engine; invalid for an address that cannot be listened on.
pub async fn change(call: Call) -> Result<Reply> {
    let old = call.engine().server_config(&call.context)?;
    let node = call.engine().inner().node.uuid();
    let mut if_version = call.expected(VIEW, node, old.spec_version)?;
    let mut config = Config::new();
    if call.request.method() == hyper::Method::PATCH {
        if_version = if_version.or(Some(old.spec_version));
        config = old.config;
    }
    let (call, mut f) = call.fields().await?;
    config.extend(f.config("config")?.unwrap_or_default());
    f.finish(&[])?;
    config.retain(|_, v| !v.is_empty());
    let settings = call.engine().server_config_check(&call.context, &config)?;
    let commit = call.engine().server_config_update(&call.context, config, if_version);
    call.app.remote.change(&call.app, &settings, commit).await?;
    Ok(empty())
}

/// `GET /1.0/metadata/configuration`: the table of keys.
///
/// # Errors
/// None.
pub async fn metadata(_: Call) -> Result<Reply> {
    let mut groups: Map<String, Value> = Map::new();
    for key in INSTANCE_KEYS {
        let group = key.name.split('.').next().unwrap_or("miscellaneous").to_owned();
        let entry = groups.entry(group).or_insert_with(|| json!({"keys": []}));
        let condition = match key.scope {
            KeyScope::Any => "",
            KeyScope::Container => "container",
            KeyScope::VirtualMachine => "virtual machine",
        };
        if let Some(list) = entry["keys"].as_array_mut() {
            list.push(json!({key.name: {
                "type": format!("{:?}", key.kind).to_lowercase(),
                "defaultdesc": key.default,
                "liveupdate": if key.live { "yes" } else { "no" },
                "condition": condition,
                "shortdesc": key.text,
            }}));
        }
    }
    let texts = |keys: &[(&str, &str)]| -> Vec<Value> {
        keys.iter().map(|(key, text)| json!({*key: {"type": "string", "shortdesc": text}})).collect()
    };
    sync(&json!({"configs": {
        "instance": groups,
        "network-bridge": {"common": {"keys": texts(BRIDGE_KEYS)}},
        "project": {"specific": {"keys": texts(karst_model::project::TEXTS)}},
        "server": {"core": {"keys": texts(SERVER_KEYS)}},
    }}))
}

/// `GET /1.0/cluster`: this server is in none.
///
/// # Errors
/// Forbidden.
pub async fn cluster(call: Call) -> Result<Reply> {
    call.context.demand_server(Permission::ServerView)?;
    sync(&json!({"server_name": "", "enabled": false, "member_config": null}))
}

/// `GET /internal/ready`, for `incus admin waitready`.
///
/// # Errors
/// Forbidden.
pub async fn ready(call: Call) -> Result<Reply> {
    call.context.demand_server(Permission::ServerView)?;
    Ok(empty())
}

/// `PUT /internal/shutdown`, for `incus admin shutdown`: all guests stop, then the server ends.
///
/// # Errors
/// Forbidden; unsupported when whoever runs this server does not listen for it; conflict, naming the guests that did not
/// stop: the server ends all the same.
pub async fn shutdown(call: Call) -> Result<Reply> {
    call.context.demand_server(Permission::ServerEdit)?;
    let call = call.bodiless().await?;
    let Some(tell) = call.app.info.shutdown.clone() else {
        return Err(Error::unsupported("this server is stopped by its launcher"));
    };
    let (engine, context) = (call.engine().clone(), call.context.clone());
    // Whoever asked may leave before the last guest has stopped. The server ends all the same: nothing starts on it any more.
    let ending = tokio::spawn(async move {
        let left = engine.host_stop(&context).await;
        // It may have been told already.
        let _ = tell.try_send(());
        left
    });
    let left = ending.await.map_err(|e| Error::internal("stopping the guests was broken off", e))??;
    match left.is_empty() {
        true => Ok(empty()),
        false => Err(Error::conflict(format!("these guests run on: {}", left.join("; ")))),
    }
}
