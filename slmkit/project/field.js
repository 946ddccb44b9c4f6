
const $=s=>document.querySelector(s),rows=[...document.querySelectorAll('tbody tr')],body=$('tbody');
let fam='',by='',down=1;const text=new Map(rows.map(r=>[r,r.textContent.toLowerCase()]));
function show(){const w=$('#q').value.toLowerCase().split(/\s+/).filter(Boolean),
 t=$('#type').value,o=$('#out').value;let n=0;
 for(const r of rows){const d=r.dataset,ok=(!fam||d.family==fam)&&(!t||d.type==t)
  &&(!o||d.outcomes.split('|').includes(o))&&w.every(x=>text.get(r).includes(x));r.hidden=!ok;n+=ok}
 $('#n').textContent=n+' of '+rows.length+' works'}
function sort(k){down=by==k?-down:1;by=k;
 const v=r=>r.dataset[k];rows.sort((a,b)=>down*v(a).localeCompare(v(b),'en',{numeric:true}));body.append(...rows);
 for(const h of document.querySelectorAll('th[data-k]'))
  h.ariaSort=h.dataset.k==k?(down>0?'ascending':'descending'):'none'}
for(const b of document.querySelectorAll('.fam button'))b.onclick=()=>{fam=fam==b.value?'':b.value;
 for(const c of document.querySelectorAll('.fam button'))c.ariaPressed=String(c.value==fam&&!!fam);show()};
for(const h of document.querySelectorAll('th[data-k]')){h.tabIndex=0;h.onclick=()=>sort(h.dataset.k);
 h.onkeydown=e=>{if(e.key=='Enter')sort(h.dataset.k)}}
$('#sort').onchange=e=>{by='';sort(e.target.value)};for(const i of ['#q','#type','#out'])$(i).oninput=show;show();
