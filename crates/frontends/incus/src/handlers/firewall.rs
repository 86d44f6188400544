//! `/1.0/network-acls`, `/1.0/network-address-sets`, `/1.0/networks/{name}/forwards`.

use super::list as respond_list;
use crate::{
    app::Call,
    fields::Fields,
    filter::Filter,
    respond::{Etag, Reply, created, empty, full, sync, sync_etag},
    wire::{
        self,
        firewall::{AclView, AddressSetView, ForwardView},
    },
};
use hyper::{
    Response,
    header::{CONTENT_TYPE, HeaderValue},
};
use karst_engine::firewall::{UpdateAcl, UpdateAddressSet, UpdateForward};
use karst_model::{
    Error, Result,
    firewall::{AclRule, ForwardPort, NetworkForward},
};
use serde_json::Value;

const ACL: &str = "network-acl";
const SET: &str = "network-address-set";
const FORWARD: &str = "network-forward";
const READ_ONLY: &[&str] = &["name", "used_by", "project", "listen_address", "location"];

/// A list of objects of which each is read by `read`; `None` when it is not there.
fn objects<T>(
    f: &mut Fields,
    name: &'static str,
    read: impl Fn(&mut Fields) -> Result<T>,
) -> Result<Option<Vec<T>>> {
    let Some(value) = f.take(name) else { return Ok(None) };
    let Value::Array(list) = value else {
        return Err(Error::invalid(name, format!("{name} must be a list")));
    };
    let mut all = vec![];
    for (n, value) in list.into_iter().enumerate() {
        let mut f = Fields::of(value, &format!("{name}[{n}]"))?;
        all.push(read(&mut f)?);
        f.finish(&[])?;
    }
    Ok(Some(all))
}

fn rule(f: &mut Fields) -> Result<AclRule> {
    let mut text = |name: &'static str| Ok::<_, Error>(f.text(name)?.unwrap_or_default().trim().to_owned());
    Ok(AclRule {
        action: text("action")?,
        source: text("source")?,
        destination: text("destination")?,
        protocol: text("protocol")?,
        source_port: text("source_port")?,
        destination_port: text("destination_port")?,
        icmp_type: text("icmp_type")?,
        icmp_code: text("icmp_code")?,
        description: text("description")?,
        state: Some(text("state")?).filter(|s| !s.is_empty()).unwrap_or_else(|| "enabled".into()),
    })
}

fn port(f: &mut Fields) -> Result<ForwardPort> {
    let snat = f.flag("snat")?;
    let mut text = |name: &'static str| Ok::<_, Error>(f.text(name)?.unwrap_or_default().trim().to_owned());
    Ok(ForwardPort {
        description: text("description")?,
        protocol: text("protocol")?,
        listen_port: text("listen_port")?,
        target_port: text("target_port")?,
        target_address: text("target_address")?,
        snat,
    })
}

/// Reads what may be set of an ACL over what is there.
fn acl_of(f: &mut Fields, mut acl: UpdateAcl) -> Result<UpdateAcl> {
    if let Some(text) = f.text("description")? {
        acl.description = text;
    }
    acl.config.extend(f.config("config")?.unwrap_or_default());
    acl.config.retain(|_, value| !value.is_empty());
    if let Some(rules) = objects(f, "ingress", rule)? {
        acl.ingress = rules;
    }
    if let Some(rules) = objects(f, "egress", rule)? {
        acl.egress = rules;
    }
    Ok(acl)
}

fn is_patch(call: &Call) -> bool {
    call.request.method() == hyper::Method::PATCH
}

/// `GET /1.0/network-acls`
///
/// # Errors
/// Those of the engine.
pub async fn acls(call: Call) -> Result<Reply> {
    let recursion = call.query.recursion()?;
    let filter = Filter::parse(call.query.get("filter"))?;
    let all = call.engine().acls(&call.context, call.project())?;
    let inner = call.engine().inner();
    let projects: Vec<String> = all.iter().map(|a| inner.project_name(Some(a.project))).collect();
    respond_list(
        recursion,
        &filter,
        all.iter().zip(&projects).map(|(acl, project)| {
            (
                AclView::of(acl, call.engine().acl_used_by(&call.context, acl), project),
                wire::path("network-acls", &acl.name, project),
            )
        }),
    )
}

/// `GET /1.0/network-acls/{name}`
///
/// # Errors
/// Those of the engine.
pub async fn acl(call: Call) -> Result<Reply> {
    let acl = call.engine().acl(&call.context, call.project(), call.param(0))?;
    let project = call.engine().inner().project_name(Some(acl.project));
    let view = AclView::of(&acl, call.engine().acl_used_by(&call.context, &acl), &project);
    sync_etag(&view, &Etag::of(ACL, acl.id.uuid(), acl.spec_version))
}

/// `POST /1.0/network-acls`
///
/// # Errors
/// Those of the engine.
pub async fn create_acl(call: Call) -> Result<Reply> {
    let (call, mut f) = call.fields().await?;
    let name = f.need_text("name")?;
    let new = acl_of(&mut f, UpdateAcl::default())?;
    f.finish(READ_ONLY)?;
    call.engine().acl_create(&call.context, call.project(), &name, new).await?;
    created(&wire::path("network-acls", &name, call.project()))
}

/// `PUT` and `PATCH /1.0/network-acls/{name}`
///
/// # Errors
/// Those of the engine.
pub async fn change_acl(call: Call) -> Result<Reply> {
    let acl = call.engine().acl(&call.context, call.project(), call.param(0))?;
    let if_version = call.expected(ACL, acl.id.uuid(), acl.spec_version)?;
    let mut base = UpdateAcl { if_version, ..Default::default() };
    if is_patch(&call) {
        base = UpdateAcl {
            description: acl.description.clone(),
            config: acl.config.clone(),
            ingress: acl.ingress.clone(),
            egress: acl.egress.clone(),
            if_version: if_version.or(Some(acl.spec_version)),
        };
    }
    let (call, mut f) = call.fields().await?;
    let new = acl_of(&mut f, base)?;
    f.finish(READ_ONLY)?;
    call.engine().acl_update(&call.context, call.project(), call.param(0), new).await?;
    Ok(empty())
}

/// `GET /1.0/network-acls/{name}/log`: the file itself, an entry of JSON a line.
///
/// # Errors
/// Those of the engine.
pub async fn acl_log(call: Call) -> Result<Reply> {
    let log = call.engine().acl_log(&call.context, call.project(), call.param(0)).await?;
    let mut reply: Reply = Response::new(full(log));
    reply.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    Ok(reply)
}

/// `POST /1.0/network-acls/{name}`: rename.
///
/// # Errors
/// Those of the engine.
pub async fn rename_acl(call: Call) -> Result<Reply> {
    let (call, mut f) = call.fields().await?;
    let new = f.need_text("name")?;
    f.finish(&[])?;
    call.engine().acl_rename(&call.context, call.project(), call.param(0), &new).await?;
    created(&wire::path("network-acls", &new, call.project()))
}

/// `DELETE /1.0/network-acls/{name}`
///
/// # Errors
/// Those of the engine.
pub async fn delete_acl(call: Call) -> Result<Reply> {
    call.engine().acl_delete(&call.context, call.project(), call.param(0)).await?;
    Ok(empty())
}

fn set_of(f: &mut Fields, mut set: UpdateAddressSet) -> Result<UpdateAddressSet> {
    if let Some(text) = f.text("description")? {
        set.description = text;
    }
    set.config.extend(f.config("config")?.unwrap_or_default());
    set.config.retain(|_, value| !value.is_empty());
    if let Some(addresses) = f.texts("addresses")? {
        set.addresses = addresses;
    }
    Ok(set)
}

/// `GET /1.0/network-address-sets`
///
/// # Errors
/// Those of the engine.
pub async fn sets(call: Call) -> Result<Reply> {
    let recursion = call.query.recursion()?;
    let filter = Filter::parse(call.query.get("filter"))?;
    let all = call.engine().address_sets(&call.context, call.project())?;
    let inner = call.engine().inner();
    let projects: Vec<String> = all.iter().map(|a| inner.project_name(Some(a.project))).collect();
    respond_list(
        recursion,
        &filter,
        all.iter().zip(&projects).map(|(set, project)| {
            (
                AddressSetView::of(set, call.engine().address_set_used_by(&call.context, set), project),
                wire::path("network-address-sets", &set.name, project),
            )
        }),
    )
}

/// `GET /1.0/network-address-sets/{name}`
///
/// # Errors
/// Those of the engine.
pub async fn set(call: Call) -> Result<Reply> {
    let set = call.engine().address_set(&call.context, call.project(), call.param(0))?;
    let project = call.engine().inner().project_name(Some(set.project));
    let view = AddressSetView::of(&set, call.engine().address_set_used_by(&call.context, &set), &project);
    sync_etag(&view, &Etag::of(SET, set.id.uuid(), set.spec_version))
}

/// `POST /1.0/network-address-sets`
///
/// # Errors
/// Those of the engine.
pub async fn create_set(call: Call) -> Result<Reply> {
    let (call, mut f) = call.fields().await?;
    let name = f.need_text("name")?;
    let new = set_of(&mut f, UpdateAddressSet::default())?;
    f.finish(READ_ONLY)?;
    call.engine().address_set_create(&call.context, call.project(), &name, new).await?;
    created(&wire::path("network-address-sets", &name, call.project()))
}

/// `PUT` and `PATCH /1.0/network-address-sets/{name}`
///
/// # Errors
/// Those of the engine.
pub async fn change_set(call: Call) -> Result<Reply> {
    let set = call.engine().address_set(&call.context, call.project(), call.param(0))?;
    let if_version = call.expected(SET, set.id.uuid(), set.spec_version)?;
    let mut base = UpdateAddressSet { if_version, ..Default::default() };
    if is_patch(&call) {
        base = UpdateAddressSet {
            description: set.description.clone(),
            config: set.config.clone(),
            addresses: set.addresses.clone(),
            if_version: if_version.or(Some(set.spec_version)),
        };
    }
    let (call, mut f) = call.fields().await?;
    let new = set_of(&mut f, base)?;
    f.finish(READ_ONLY)?;
    call.engine().address_set_update(&call.context, call.project(), call.param(0), new).await?;
    Ok(empty())
}

/// `POST /1.0/network-address-sets/{name}`: rename.
///
/// # Errors
/// Those of the engine.
pub async fn rename_set(call: Call) -> Result<Reply> {
    let (call, mut f) = call.fields().await?;
    let new = f.need_text("name")?;
    f.finish(&[])?;
    call.engine().address_set_rename(&call.context, call.project(), call.param(0), &new).await?;
    created(&wire::path("network-address-sets", &new, call.project()))
}

/// `DELETE /1.0/network-address-sets/{name}`
///
/// # Errors
/// Those of the engine.
pub async fn delete_set(call: Call) -> Result<Reply> {
    call.engine().address_set_delete(&call.context, call.project(), call.param(0)).await?;
    Ok(empty())
}

fn forward_of(f: &mut Fields, mut forward: UpdateForward) -> Result<UpdateForward> {
    if let Some(text) = f.text("description")? {
        forward.description = text;
    }
    forward.config.extend(f.config("config")?.unwrap_or_default());
    forward.config.retain(|_, value| !value.is_empty());
    forward.config.retain(|_, v| !v.is_empty());
    if let Some(ports) = objects(f, "ports", port)? {
        forward.ports = ports;
    }
    Ok(forward)
}

fn forward_path(network: &str, project: &str, listen: &str) -> String {
    let network = wire::path("networks", network, project);
    match network.split_once('?') {
        Some((path, query)) => format!("{path}/forwards/{listen}?{query}"),
        None => format!("{network}/forwards/{listen}"),
    }
}

/// A forward has no id of its own: its network's, and the address in the view's name.
fn forward_view(forward: &NetworkForward) -> String {
    format!("{FORWARD}-{}", forward.listen_address)
}

/// `GET /1.0/networks/{name}/forwards`
///
/// # Errors
/// Those of the engine.
pub async fn forwards(call: Call) -> Result<Reply> {
    let recursion = call.query.recursion()?;
    let filter = Filter::parse(call.query.get("filter"))?;
    let all = call.engine().forwards(&call.context, call.project(), call.param(0)).await?;
    respond_list(
        recursion,
        &filter,
        all.iter().map(|f| {
            (ForwardView::of(f), forward_path(call.param(0), call.project(), &f.listen_address.to_string()))
        }),
    )
}

/// `GET /1.0/networks/{name}/forwards/{listenAddress}`
///
/// # Errors
/// Those of the engine.
pub async fn forward(call: Call) -> Result<Reply> {
    let forward = call.engine().forward(&call.context, call.project(), call.param(0), call.param(1)).await?;
    let etag = Etag::of(&forward_view(&forward), forward.network.uuid(), forward.spec_version);
    sync_etag(&ForwardView::of(&forward), &etag)
}

/// `POST /1.0/networks/{name}/forwards`
///
/// # Errors
/// Those of the engine.
pub async fn create_forward(call: Call) -> Result<Reply> {
    let (call, mut f) = call.fields().await?;
    let listen = f.need_text("listen_address")?;
    let new = forward_of(&mut f, UpdateForward::default())?;
    f.finish(READ_ONLY)?;
    call.engine().forward_create(&call.context, call.project(), call.param(0), &listen, new).await?;
    created(&forward_path(call.param(0), call.project(), &listen))
}

/// `PUT` and `PATCH /1.0/networks/{name}/forwards/{listenAddress}`
///
/// # Errors
/// Those of the engine.
pub async fn change_forward(call: Call) -> Result<Reply> {
    let forward = call.engine().forward(&call.context, call.project(), call.param(0), call.param(1)).await?;
    let if_version = call.expected(&forward_view(&forward), forward.network.uuid(), forward.spec_version)?;
    let mut base = UpdateForward { if_version, ..Default::default() };
    if is_patch(&call) {
        base = UpdateForward {
            description: forward.description.clone(),
            config: forward.config.clone(),
            ports: forward.ports.clone(),
            if_version: if_version.or(Some(forward.spec_version)),
        };
    }
    let (call, mut f) = call.fields().await?;
    let new = forward_of(&mut f, base)?;
    f.finish(READ_ONLY)?;
    call.engine().forward_update(&call.context, call.project(), call.param(0), call.param(1), new).await?;
    Ok(empty())
}

/// `DELETE /1.0/networks/{name}/forwards/{listenAddress}`
///
/// # Errors
/// Those of the engine.
pub async fn delete_forward(call: Call) -> Result<Reply> {
    call.engine().forward_delete(&call.context, call.project(), call.param(0), call.param(1)).await?;
    Ok(empty())
}

/// `GET /1.0/karst/network/explain?from=…&to=…&port=…`: what becomes of the first packet of a connection, and which rule says
/// so.
///
/// # Errors
/// Those of the engine.
pub async fn explain(call: Call) -> Result<Reply> {
    let need = |name: &str| {
        call.query
            .get(name)
            .filter(|v| !v.is_empty())
            .map(str::to_owned)
            .ok_or_else(|| Error::invalid(name, format!("the query parameter {name:?} is missing")))
    };
    let (from, to, port) = (need("from")?, need("to")?, need("port")?);
    sync(&call.engine().network_explain(&call.context, call.project(), &from, &to, &port).await?)
}
