//! Network filters, of which there is a fixed set, and the interfaces of running domains that are bound to one.

use super::{Answered, domain::OPAQUE, int, listed, names, text};
use crate::{
    domain_uuid,
    error::{Code, Part, VirError},
    session::Call,
    xdr::Writer,
    xml::{
        Element,
        machine::{Opaque, refuse},
        nwfilter::{FILTERS, Filter, find, shown},
    },
};
use karst_engine::compute::expand::parse_devices;
use uuid::Uuid;

fn missing(text: String) -> VirError {
    VirError::new(Code::NoNwfilter, Part::Nwfilter, text)
}

fn by_uuid_of(uuid: Uuid) -> Result<Filter, VirError> {
    let found = FILTERS.into_iter().find(|f| f.uuid() == uuid);
    found.ok_or_else(|| missing(format!("no nwfilter with matching uuid '{uuid}'")))
}

fn write(w: &mut Writer, filter: Filter) {
    w.string(filter.name).uuid(filter.uuid());
}

/// `CONNECT_LIST_ALL_NWFILTERS`
pub async fn list(call: Call) -> Answered {
    let (need_results, flags) = call.arguments(|r| Ok((r.i32()?, r.u32()?)))?;
    call.known_flags(flags, 0)?;
    listed(FILTERS.to_vec(), need_results, write)
}

/// `CONNECT_NUM_OF_NWFILTERS`
pub async fn count(_: Call) -> Answered {
    Ok(int(FILTERS.len() as i32))
}

/// `CONNECT_LIST_NWFILTERS`
pub async fn name_list(call: Call) -> Answered {
    let max = call.arguments(|r| r.i32())?;
    names(FILTERS.iter().map(|f| f.name), max)
}

/// `NWFILTER_LOOKUP_BY_NAME`
pub async fn by_name(call: Call) -> Answered {
    let name = call.arguments(|r| r.string())?;
    let filter = find(&name).ok_or_else(|| missing(format!("no nwfilter with matching name '{name}'")))?;
    let mut w = Writer::new();
    write(&mut w, filter);
    Ok(w.finish().into())
}

/// `NWFILTER_LOOKUP_BY_UUID`
pub async fn by_uuid(call: Call) -> Answered {
    let filter = by_uuid_of(call.arguments(|r| r.uuid())?)?;
    let mut w = Writer::new();
    write(&mut w, filter);
    Ok(w.finish().into())
}

/// `NWFILTER_GET_XML_DESC`
pub async fn xml(call: Call) -> Answered {
    let (_, uuid, flags) = call.arguments(|r| Ok((r.string()?, r.uuid()?, r.u32()?)))?;
    call.known_flags(flags, 0)?;
    Ok(text(&by_uuid_of(uuid)?.document()))
}

/// `NWFILTER_DEFINE_XML`, `NWFILTER_DEFINE_XML_FLAGS`
pub async fn define(_: Call) -> Answered {
    Err(refuse("filter", "the filters are those that are there; rules of your own are ACLs of networks"))
}

/// `NWFILTER_UNDEFINE`
pub async fn undefine(call: Call) -> Answered {
    let (_, uuid) = call.arguments(|r| Ok((r.string()?, r.uuid()?)))?;
    by_uuid_of(uuid)?;
    Err(VirError::new(Code::OperationUnsupported, Part::Nwfilter, "the filters that are there stay"))
}

/// An interface that is filtered.
struct Binding {
    port: String,
    /// Its `<filterref>`.
    filter: Element,
    mac: String,
    owner: (String, Uuid),
}

impl Binding {
    fn name(&self) -> &str {
        self.filter.attribute("filter").unwrap_or_default()
    }
}

fn bindings(call: &Call) -> Result<Vec<Binding>, VirError> {
    let mut all = vec![];
    for view in call.session.guests()?.iter().filter(|v| super::domain::is_running(v)) {
        let applied = view.runtime.as_ref().and_then(|r| r.applied.as_ref());
        let config = applied.map_or(&view.expanded_config, |a| &a.config);
        let opaque = config.get(OPAQUE).map(|text| Opaque::parse(text)).unwrap_or_default();
        let devices = applied.map_or(&view.expanded_devices, |a| &a.devices);
        let parsed = parse_devices(devices)?;
        for (name, nic) in parsed.nics.iter().filter(|(_, nic)| nic.attached) {
            let Some(identity) = view.identity(name, devices) else { continue };
            let (Some(port), Some(mac)) = (&identity.host_interface, &identity.mac) else { continue };
            let flags = (nic.port.mac_filter, nic.port.ipv4_filter || nic.port.ipv6_filter);
            let kept = opaque.nics.get(mac).and_then(|e| e.find("filterref"));
            let Some(filter) = shown(flags, (nic.ipv4, nic.ipv6), kept) else { continue };
            let owner = (view.instance.name.to_string(), domain_uuid(view));
            all.push(Binding { port: port.clone(), filter, mac: mac.clone(), owner });
        }
    }
    all.sort_by(|a, b| a.port.cmp(&b.port));
    Ok(all)
}

fn binding(call: &Call, port: &str) -> Result<Binding, VirError> {
    let text = || format!("no nwfilter binding for port dev '{port}'");
    let found = bindings(call)?.into_iter().find(|b| b.port == port);
    found.ok_or_else(|| VirError::new(Code::NoNwfilterBinding, Part::Nwfilter, text()))
}

/// `CONNECT_LIST_ALL_NWFILTER_BINDINGS`
pub async fn list_bindings(call: Call) -> Answered {
    let (need_results, flags) = call.arguments(|r| Ok((r.i32()?, r.u32()?)))?;
    call.known_flags(flags, 0)?;
    listed(bindings(&call)?, need_results, |w, b| {
        w.string(&b.port).string(b.name());
    })
}

/// `NWFILTER_BINDING_LOOKUP_BY_PORT_DEV`
pub async fn binding_by_port(call: Call) -> Answered {
    let port = call.arguments(|r| r.string())?;
    let found = binding(&call, &port)?;
    let mut w = Writer::new();
    w.string(&found.port).string(found.name());
    Ok(w.finish().into())
}

/// `NWFILTER_BINDING_GET_XML_DESC`
pub async fn binding_xml(call: Call) -> Answered {
    let (port, _, flags) = call.arguments(|r| Ok((r.string()?, r.string()?, r.u32()?)))?;
    call.known_flags(flags, 0)?;
    let Binding { port, filter, mac, owner: (name, uuid) } = binding(&call, &port)?;
    let owner = Element::new("owner").child(Element::text("name", name)).child(Element::text("uuid", uuid));
    let e = Element::new("filterbinding")
        .child(owner)
        .child(Element::new("portdev").with("name", port))
        .child(Element::new("mac").with("address", mac))
        .child(filter);
    Ok(text(&e.document()))
}

/// `NWFILTER_BINDING_CREATE_XML`, `NWFILTER_BINDING_DELETE`
pub async fn change_binding(_: Call) -> Answered {
    let text = "an interface is bound by its definition: <filterref> of the domain (update-device, define)";
    Err(VirError::new(Code::OperationUnsupported, Part::Nwfilter, text))
}
